// The variants in full.
#include "variants.cuh"

const std::vector<Functions>& variants() {
  static const std::vector<Functions> known = [] {
    std::vector<Functions> v = {
        Of<sm90::Variant<1, 3, 4>, false>::all("c1s3o4"),
        Of<sm90::Variant<2, 4, 2>, false>::all("c2s4o2"),
        Of<sm90::Variant<1, 3, 2, 3>, false>::all("g3"),
        Of<sm90::AlongN<sm90::Variant<2, 3, 2, 3>>, false>::all("g3n2"),
        Of<sm90::AlongN<sm90::Variant<4, 3, 2, 3>>, true>::all("g3n4"),
        Of<sm90::AlongN<sm90::Variant<2, 3, 4>>, true>::all("n2"),
        Of<sm90::Leading<sm90::Variant<2, 4, 2>, 4>, false>::all("c2l4"),
        Of<sm90::Leading<sm90::Variant<2, 4, 2>, 2>, true>::all("c2l2"),
    };
    v.push_back({"product", moe::cuda::ffn_up, moe::cuda::ffn_down, moe::cuda::ffn_down_backward, moe::cuda::ffn_up_backward, moe::cuda::ffn_weight_backward, nullptr, false});
    return v;
  }();
  return known;
}
