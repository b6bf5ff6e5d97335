#include "variants.cuh"

using namespace moe::cuda::sm90;
using Plain = Variant<1, 3, 4>;
using Deep = Variant<1, 4, 2>;
using Pair = Variant<2, 4, 2>;
using High = Variant<1, 3, 2, 3>;

void add_more(std::vector<Functions>& v) {
  v.push_back(Of<Fetching<Plain, 4>, true>::all("f4"));
  v.push_back(Of<Fetching<Plain, 8>, true>::all("f8"));
  v.push_back(Of<Fetching<High, 4>, true>::all("g3f4"));
  v.push_back(Of<Fetching<High, 8>, true>::all("g3f8"));
  v.push_back(Of<Leading<Deep, 1>, true>::all("l1"));
  v.push_back(Of<Leading<Deep, 2>, true>::all("l2"));
  v.push_back(Of<Leading<Deep, 4>, true>::all("l4"));
  v.push_back(Of<Leading<Pair, 1>, true>::all("c2l1"));
  v.push_back(Of<Leading<Pair, 4>, true>::all("c2l4"));
  v.push_back(Of<AlongN<Pair>, true>::all("n2"));
  v.push_back(Of<Leading<AlongN<Pair>, 1>, true>::all("n2l1"));
  v.push_back(Of<Plain, true, DryBf16>::all("dry"));
  v.push_back(Of<High, true, DryBf16>::all("g3dry"));
  v.push_back(Of<Fetching<High, 4>, true, DryBf16>::all("g3f4dry"));
  v.push_back(Of<Variant<2, 3, 2, 3>, true, DryBf16>::all("g3c2dry"));
}
