// Backward of select. A sub-warp writes one row of the gradients of unselected experts, then its lanes scatter the K
// selected ones.
#include "select.h"

#include <algorithm>

#include "common/subwarp.cuh"

namespace moe::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 1 << 16;

template <class Format, int kElements>
struct alignas(sizeof(typename Format::Bits) * kElements) Chunk {
  typename Format::Bits bits[kElements];
};

// kElements adjacent gradients are written at once; rows are multiples of that.
template <class Format, int kLanes, int kElements>
__global__ void __launch_bounds__(kThreads) select_backward_kernel(const SelectBackwardParams p) {
  using Bits = typename Format::Bits;
  using Real = typename Format::Real;
  constexpr int kSlots = kMaxTopK / kLanes;  // selected experts per lane
  const int lane = threadIdx.x % kLanes;
  const bool dense = p.score == Score::kSoftmax && !p.renormalize;
  const Real scale = Real(p.scaling_factor);
  const int64_t stride = int64_t(gridDim.x) * (kThreads / kLanes);
  const int64_t first = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t warp_first = first - threadIdx.x % kWarp / kLanes;
  launch_dependent_grids();
  wait_on_dependent_grids();

  for (int64_t ahead = 0; warp_first + ahead < p.tokens; ahead += stride) {
    const bool active = first + ahead < p.tokens;  // all lanes of the warp take part in the shuffles
    const int64_t t = active ? first + ahead : 0;
    const Bits* const logits = static_cast<const Bits*>(p.logits) + t * p.row_stride;
    Bits* const out = static_cast<Bits*>(p.grad_logits) + t * p.experts;

    Real weights[kSlots], grads[kSlots], dot = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int j = s * kLanes + lane;
      weights[s] = j < p.top_k ? static_cast<const Real*>(p.weights)[t * p.top_k + j] : Real(0);
      grads[s] = j < p.top_k ? static_cast<const Real*>(p.grad_weights)[t * p.top_k + j] : Real(0);
      dot += weights[s] * grads[s];
    }
    dot = subwarp_sum<kLanes>(dot);
    const Real mean = dot / scale;  // of the gradients, by the weights before scaling

    Real largest = -INFINITY, sum = 0;
    if (dense) {
      for (int e = lane; e < p.experts; e += kLanes) largest = max(largest, Format::to_real(logits[e]));
      largest = subwarp_max<kLanes>(largest);
      for (int e = lane; e < p.experts; e += kLanes) sum += exp(Format::to_real(logits[e]) - largest);
      sum = subwarp_sum<kLanes>(sum);
    }
    if (active) {
      for (int e = lane * kElements; e < p.experts; e += kLanes * kElements) {
        Chunk<Format, kElements> chunk;
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const Real probability = dense ? exp(Format::to_real(logits[e + i]) - largest) / sum : Real(0);
          chunk.bits[i] = dense ? Format::from_real(-dot * probability) : Bits(0);
        }
        *reinterpret_cast<Chunk<Format, kElements>*>(out + e) = chunk;
      }
    }
    __syncwarp();  // the row is written before the selected
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int j = s * kLanes + lane;
      if (!active || j >= p.top_k) continue;
      const int id = p.expert_ids[t * p.top_k + j];
      Real slope = weights[s];
      if (p.score != Score::kSoftmax) slope *= log_derivative(p.score, Format::to_real(logits[id]));
      const bool alone = p.score != Score::kSoftmax && !p.renormalize;  // no weight depends on another logit
      out[id] = Format::from_real(slope * (alone ? grads[s] : grads[s] - mean));
    }
  }
}

template <class Format, int kElements>
void launch(const SelectBackwardParams& p, Stream stream) {
  const auto with = [&](auto lanes, auto kernel) {
    const int64_t blocks = std::min(ceil_div<int64_t>(p.tokens, kThreads / lanes), kMaxBlocks);
    launch_pdl(kernel, unsigned(blocks), kThreads, 0, stream, p);
  };
  if (p.experts <= 128) with(8, select_backward_kernel<Format, 8, kElements>);
  else with(32, select_backward_kernel<Format, 32, kElements>);
}

}  // namespace

Status select_backward(const SelectBackwardParams& p, Stream stream) {
  if (const Status status = check_sizes(p); !status.ok()) return status;
  if (p.tokens == 0) return {};
  return dispatch_dtype(p.dtype, [&](auto format) -> Status {
    using Format = decltype(format);
    constexpr int kWide = 16 / int(sizeof(typename Format::Bits));
    const bool aligned = p.experts % kWide == 0 && reinterpret_cast<uintptr_t>(p.grad_logits) % 16 == 0;
    if (aligned) launch<Format, kWide>(p, stream);
    else launch<Format, 1>(p, stream);
    return last_error();
  });
}

}  // namespace moe::cuda
