// The variants in full: a shape may choose them. variants_more.cu has those to be measured.
#include "variants.cuh"

void add_more(std::vector<Functions>& v);

const std::vector<Functions>& variants() {
  static const std::vector<Functions> known = [] {
    std::vector<Functions> v = {
        Of<sm90::Variant<1, 3, 4>, false>::all("c1s3o4"),
        Of<sm90::Variant<1, 4, 2>, false>::all("c1s4o2"),
        Of<sm90::Variant<2, 3, 4>, false>::all("c2s3o4"),
        Of<sm90::Variant<2, 4, 2>, false>::all("c2s4o2"),
        Of<sm90::Variant<1, 3, 2, 3>, false>::all("g3"),
        Of<sm90::Variant<2, 3, 2, 3>, false>::all("g3c2"),
    };
    v.push_back({"product", moe::cuda::ffn_up, moe::cuda::ffn_down, moe::cuda::ffn_down_backward, moe::cuda::ffn_up_backward, moe::cuda::ffn_weight_backward, nullptr, false});
    add_more(v);
    return v;
  }();
  return known;
}
