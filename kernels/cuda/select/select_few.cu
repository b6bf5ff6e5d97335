// Select with any weighting, any ranking and any dtype, where experts are few.
#include <algorithm>

#include "select/select_subwarp.cuh"

namespace moe::cuda {

void launch_few_experts(const SelectLaunch& p, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto format) -> Status {
    using Format = decltype(format);
    if (p.experts <= 32) launch_select<Format, 4, 8, kMaxTopK, false, true>(p, stream);
    else launch_select<Format, 8, 8, kMaxTopK, false, true>(p, stream);
    return {};
  });
}

}  // namespace moe::cuda
