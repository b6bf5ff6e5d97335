// Select with any weighting, any ranking and any dtype.
#include <algorithm>

#include "select/select_kernel.cuh"

namespace moe::cuda {

void launch_general(const SelectLaunch& p, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto format) -> Status {
    using Format = decltype(format);
    constexpr int kMaxK = kMaxTopK;
    const int e = p.experts;
    if (e <= 32) launch_select<Format, 4, 8, kMaxK, false, true>(p, stream);
    else if (e <= 64) launch_select<Format, 8, 8, kMaxK, false, true>(p, stream);
    else if (e <= 256) launch_select<Format, 32, 8, kMaxK, false, true>(p, stream);
    else launch_select<Format, 32, 32, kMaxK, false, true>(p, stream);  // check_sizes: at most 1024
    return {};
  });
}

}  // namespace moe::cuda
