// Exchange of counts between ranks, and the barrier alone. One block: there is little to do, and all of it waits for the
// other ranks. The next kernel may not start before the wait is over: its blocks would displace other work meanwhile.
#include "common/subwarp.cuh"
#include "symmetric/signals.cuh"

namespace moe::cuda {
namespace {

constexpr int kThreads = kMaxExperts;  // one thread per expert
constexpr int kWarps = kThreads / kWarp;

// Exclusive sum over the block, in a fixed order.
__device__ int32_t block_exclusive_sum(int32_t value) {
  __shared__ int32_t totals[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t total;
  const int32_t below = warp_exclusive_sum(value, total);
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  int32_t all;
  const int32_t lower = warp_exclusive_sum(totals[lane], all);
  return below + __shfl_sync(kFullMask, lower, warp);
}
static_assert(kWarps == kWarp, "one lane per warp's total");

__global__ void __launch_bounds__(kThreads) exchange_counts_kernel(const ExchangeCountsParams p) {
  __shared__ int32_t begins[kThreads];
  const Signals& s = p.signals;
  const int e = threadIdx.x, words = p.experts + 1;
  wait_on_dependent_grids();
  const uint32_t epoch = next_epoch(s, p.steps);
  // Epochs alternate between two halves. Between two epochs of the same half lies one barrier at least, which a rank
  // reaches only when it has read: so no rank writes what is still read.
  const int64_t half = int64_t(epoch % 2) * s.ranks * words;
  const int32_t first = e < p.experts ? p.own_offsets[e] : 0;
  if (p.steps & kSignal) {
    for (int i = e; i < words; i += kThreads) {
      const int32_t value = i < p.experts ? p.own_offsets[i + 1] - p.own_offsets[i] : p.buffer;
      for (int rank = 0; rank < s.ranks; ++rank) {
        reinterpret_cast<int32_t*>(p.counts[rank])[half + s.rank * words + i] = value;
      }
    }
  }
  arrive_and_wait(s, p.steps, epoch);
  launch_dependent_grids();
  if (!(p.steps & kWait)) return;

  const int32_t* const counts = reinterpret_cast<const int32_t*>(p.counts[s.rank]) + half;
  if (e < s.ranks && __ldcg(counts + e * words + p.experts) != p.buffer) set_error(s, Fault::kBuffer, e);
  int32_t before = 0, total = 0;  // rows of this expert: of lower ranks, and all
  for (int rank = 0; e < p.experts && rank < s.ranks; ++rank) {
    const int32_t count = __ldcg(counts + rank * words + e);
    before += rank < s.rank ? count : 0;
    total += count;
  }
  begins[e] = block_exclusive_sum(total);
  __syncthreads();
  if (e >= p.experts) return;
  const int local = p.experts / s.ranks, holder = e / local;
  const int32_t begin = begins[e] - begins[holder * local];
  if (int64_t(begin) + total > p.capacity) set_error(s, Fault::kCapacity, holder);
  p.dst_offset[e] = begin + before - first;
  if (holder == s.rank) {
    p.expert_offsets[e - holder * local] = begin;
    if (e == (holder + 1) * local - 1) p.expert_offsets[local] = begin + total;
  }
}

__global__ void __launch_bounds__(kMaxRanks) barrier_kernel(const BarrierParams p) {
  wait_on_dependent_grids();
  arrive_and_wait(p.signals, p.steps, next_epoch(p.signals, p.steps));
  launch_dependent_grids();
}

}  // namespace

Status exchange_counts(const ExchangeCountsParams& p, Stream stream) {
  if (const Status status = check_sizes(p); !status.ok()) return status;
  launch_pdl(exchange_counts_kernel, 1, kThreads, 0, stream, p);
  return last_error();
}

Status barrier(const BarrierParams& p, Stream stream) {
  if (const Status status = check_sizes(p.signals); !status.ok()) return status;
  launch_pdl(barrier_kernel, 1, kMaxRanks, 0, stream, p);
  return last_error();
}

}  // namespace moe::cuda
