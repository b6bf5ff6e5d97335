// Select on the GPU. kLanes lanes of a warp share a row and hold kPerLane logits each, in registers, as
// order-preserving keys. A round is one butterfly over (key, id); ties go to the lower id. Only the K winners
// are exponentiated: with weights normalised over them the full softmax's denominator cancels.
#include "select.h"

#include <algorithm>

#include "launch.cuh"

namespace moe::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxBlocks = 2048;  // then rows are strided over: bounds the merging of the counts

__global__ void clear_counts(int32_t* tokens_per_expert, int32_t* invalid_rows, int experts) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < experts) tokens_per_expert[i] = 0;
  if (i == 0) *invalid_rows = 0;
}

template <class Format, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kThreads) select_kernel(const SelectParams p) {
  using Ord = Order<Format>;
  using Key = typename Ord::Key;
  using Real = typename Format::Real;
  constexpr int kRows = kThreads / kLanes;
  constexpr int kKept = (kLanes * kPerLane < kMaxTopK ? kLanes * kPerLane : kMaxTopK) / kLanes;

  __shared__ int32_t counts[kLanes * kPerLane];
  __shared__ int32_t invalid;
  for (int e = threadIdx.x; e < p.experts; e += kThreads) counts[e] = 0;
  if (threadIdx.x == 0) invalid = 0;
  __syncthreads();

  const int lane = threadIdx.x % kLanes;
  const unsigned group = (kLanes == kWarp ? kAllLanes : (1u << (kLanes % kWarp)) - 1)
                         << (threadIdx.x % kWarp / kLanes * kLanes);

  // All lanes of a warp stay in the loop together: the shuffles name all of them.
  const int64_t stride = int64_t(gridDim.x) * kRows;
  for (int64_t base = int64_t(blockIdx.x) * kRows; base < p.tokens; base += stride) {
    const int64_t t = base + threadIdx.x / kLanes;
    const bool active = t < p.tokens;
    const Key* row = static_cast<const Key*>(p.logits) + (active ? t : 0) * p.row_stride;

    Key keys[kPerLane];
    bool nan = false;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      const int e = v * kLanes + lane;
      keys[v] = Ord::kTaken;
      if (e < p.experts) {
        const Key bits = row[e];
        keys[v] = Ord::key(bits);
        nan |= Ord::is_nan(bits);
      }
    }
    bool bad = __ballot_sync(kAllLanes, nan) & group;

    int32_t kept_ids[kKept];
    Real kept_weights[kKept];
    Real top = 0, sum = 0;
    for (int j = 0; j < p.top_k; ++j) {
      Key best = keys[0];
      int id = lane;
#pragma unroll
      for (int v = 1; v < kPerLane; ++v) {
        if (keys[v] > best) {  // strictly: the lower id keeps a tie
          best = keys[v];
          id = v * kLanes + lane;
        }
      }
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
        const Key other = __shfl_xor_sync(kAllLanes, best, step);
        const int other_id = __shfl_xor_sync(kAllLanes, id, step);
        if (other > best || (other == best && other_id < id)) {
          best = other;
          id = other_id;
        }
      }
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        if (v * kLanes + lane == id) keys[v] = Ord::kTaken;
      }

      if (j == 0) {
        bad |= best == Ord::kPlusInf;
        top = Ord::value(best);
      }
      bad |= best == Ord::kMinusInf;
      const Real weight = j == 0 ? Real(1) : exp(Ord::value(best) - top);
      sum += weight;
#pragma unroll
      for (int s = 0; s < kKept; ++s) {
        if (s * kLanes + lane == j) {
          kept_ids[s] = id;
          kept_weights[s] = weight;
        }
      }
    }

    if (!active) continue;
    if (bad && lane == 0) atomicAdd(&invalid, 1);
#pragma unroll
    for (int s = 0; s < kKept; ++s) {
      const int j = s * kLanes + lane;
      if (j < p.top_k) {
        p.expert_ids[t * p.top_k + j] = kept_ids[s];
        static_cast<Real*>(p.weights)[t * p.top_k + j] = bad ? Real(NAN) : kept_weights[s] / sum;
        atomicAdd(&counts[kept_ids[s]], 1);
      }
    }
  }

  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += kThreads) {
    if (counts[e]) atomicAdd(&p.tokens_per_expert[e], counts[e]);
  }
  if (threadIdx.x == 0 && invalid) atomicAdd(p.invalid_rows, invalid);
}

template <class Format, int kLanes, int kPerLane>
void launch(const SelectParams& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(p.tokens, kThreads / kLanes);
  select_kernel<Format, kLanes, kPerLane>
      <<<unsigned(std::min<int64_t>(blocks, kMaxBlocks)), kThreads, 0, stream>>>(p);
}

}  // namespace

Status select_forward(const SelectParams& p, Stream raw) {
  if (const Status status = check_sizes(p); !status.ok()) return status;
  const cudaStream_t stream = native(raw);
  return dispatch(p.dtype, [&](auto format) -> Status {
    using Format = decltype(format);
    clear_counts<<<ceil_div(p.experts, kThreads), kThreads, 0, stream>>>(p.tokens_per_expert,
                                                                         p.invalid_rows, p.experts);
    if (p.tokens == 0) return launched();
    const int e = p.experts;
    if (e <= 8) launch<Format, 4, 2>(p, stream);
    else if (e <= 16) launch<Format, 8, 2>(p, stream);
    else if (e <= 32) launch<Format, 8, 4>(p, stream);
    else if (e <= 64) launch<Format, 16, 4>(p, stream);
    else if (e <= 128) launch<Format, 32, 4>(p, stream);
    else if (e <= 256) launch<Format, 32, 8>(p, stream);
    else if (e <= 512) launch<Format, 32, 16>(p, stream);
    else launch<Format, 32, 32>(p, stream);  // check_sizes: at most 1024
    return launched();
  });
}

}  // namespace moe::cuda
