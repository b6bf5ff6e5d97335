// Backward of select: a warp writes one row of zeros, then its lanes put the K gradients in their places.
#include "select.h"

#include <algorithm>

#include "launch.cuh"

namespace moe::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 1 << 16;

template <class Format>
__global__ void __launch_bounds__(kThreads) select_backward_kernel(const SelectBackwardParams p) {
  using Bits = typename Format::Bits;
  using Real = typename Format::Real;
  static_assert(kMaxTopK <= kWarp, "one lane holds one selected expert");
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / kWarp);

  for (int64_t t = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; t < p.tokens; t += warps) {
    const bool selected = lane < p.top_k;
    const int64_t slot = t * p.top_k + lane;
    const Real weight = selected ? static_cast<const Real*>(p.weights)[slot] : Real(0);
    const Real grad = selected ? static_cast<const Real*>(p.grad_weights)[slot] : Real(0);
    Real dot = weight * grad;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);

    Bits* out = static_cast<Bits*>(p.grad_logits) + t * p.experts;
    for (int e = lane; e < p.experts; e += kWarp) out[e] = 0;
    __syncwarp();  // the zeros come before the gradients
    if (selected) out[p.expert_ids[slot]] = Format::from_real(weight * (grad - dot));
  }
}

}  // namespace

Status select_backward(const SelectBackwardParams& p, Stream stream) {
  if (const Status status = check_sizes(p); !status.ok()) return status;
  return dispatch(p.dtype, [&](auto format) -> Status {
    if (p.tokens == 0) return {};
    const int64_t blocks = std::min(ceil_div<int64_t>(p.tokens, kThreads / kWarp), kMaxBlocks);
    select_backward_kernel<decltype(format)><<<unsigned(blocks), kThreads, 0, native(stream)>>>(p);
    return launched();
  });
}

}  // namespace moe::cuda
