// Counts for exchanges between ranks: three small kernels in place of a score of torch's, each of which costs the host
// more than all of them the device.
#include "row_counts.h"

#include <algorithm>

#include "groups.cuh"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kManyThreads = 1024;  // of the one block that sums
constexpr int64_t kMostBlocks = 1 << 16;

__global__ void __launch_bounds__(kThreads) bin_kernel(const BinParams p) {
  let_next_start();
  wait_for_previous();
  const int local = p.share.local_experts, remote = (p.share.ranks - 1) * local, begin = p.share.rank * local;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t slot = int64_t(blockIdx.x) * kThreads + threadIdx.x; slot < p.slots; slot += step) {
    const int32_t id = p.expert_ids[slot], own = id - begin;
    const int32_t chunk = int32_t(slot / p.chunk_slots);
    int32_t bin = chunk * remote + (own < 0 ? id : id - local);
    if (own >= 0 && own < local) bin = p.share.chunks * remote + own;
    p.bins[slot] = uint32_t(id) < uint32_t(remote + local) ? bin : -1;
  }
}

__global__ void __launch_bounds__(kThreads) leaving_kernel(const LeavingParams p) {
  let_next_start();
  wait_for_previous();
  const auto [rank, ranks, chunks, local] = p.share;
  const int remote = chunks * (ranks - 1) * local, each = chunks * local;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i <= local) p.own_offsets[i] = p.bin_offsets[remote + i] - p.bin_offsets[remote];
  if (i >= ranks * each) return;
  const int to = i / each, chunk = i % each / local, expert = i % local;
  const int32_t* const bin = p.bin_offsets + (chunk * (ranks - 1) + to - (to > rank)) * local + expert;
  p.leaving[i] = to == rank ? 0 : bin[1] - bin[0];
}

// A warp a sum of the totals, then a warp a chunk's running sum.
__global__ void __launch_bounds__(kManyThreads) arriving_kernel(const ArrivingParams p) {
  let_next_start();
  wait_for_previous();
  const auto [rank, ranks, chunks, local] = p.share;
  const int lane = threadIdx.x % kWarp, sums = 2 * chunks * ranks;
  for (int task = threadIdx.x / kWarp; task < sums + chunks; task += kManyThreads / kWarp) {
    if (task < sums) {
      const int chunk = task / ranks % chunks, other = task % ranks;
      const int32_t* const counts = (task < sums / 2 ? p.leaving : p.arriving) + (other * chunks + chunk) * local;
      int32_t sum = 0;
      for (int e = lane; e < local; e += kWarp) sum += counts[e];
      sum = group_sum<kWarp>(sum);
      if (lane == 0) p.totals[task] = sum;
      continue;
    }
    const int chunk = task - sums;
    int32_t* const offsets = p.offsets + chunk * (local + 1);
    int32_t before = 0, total;
    for (int first = 0; first < local; first += kWarp) {
      const int e = first + lane;
      int32_t count = 0;
      for (int from = 0; e < local && from < ranks; ++from) count += p.arriving[(from * chunks + chunk) * local + e];
      const int32_t lower = before + warp_exclusive_sum(count, total);
      if (e < local) offsets[e] = lower;
      before += total;
    }
    if (lane == 0) offsets[local] = before;
  }
}

}  // namespace

Status bin_slots(const BinParams& p, Stream stream) {
  if (const Status status = check_sizes(p.share); !status.ok()) return status;
  if (p.slots < 0 || p.slots > INT32_MAX || p.chunk_slots < 1) return {Code::kSlots};
  if (p.slots == 0) return {};
  if ((p.slots - 1) / p.chunk_slots >= p.share.chunks) return {Code::kShare};
  launch_early(bin_kernel, unsigned(std::min(ceil_div<int64_t>(p.slots, kThreads), kMostBlocks)), kThreads, 0, stream, p);
  return launched();
}

Status count_leaving(const LeavingParams& p, Stream stream) {
  if (const Status status = check_sizes(p.share); !status.ok()) return status;
  const int counts = std::max(p.share.ranks * p.share.chunks * p.share.local_experts, p.share.local_experts + 1);
  launch_early(leaving_kernel, unsigned(ceil_div(counts, kThreads)), kThreads, 0, stream, p);
  return launched();
}

Status count_arriving(const ArrivingParams& p, Stream stream) {
  if (const Status status = check_sizes(p.share); !status.ok()) return status;
  launch_early(arriving_kernel, 1, kManyThreads, 0, stream, p);
  return launched();
}

}  // namespace moe::cuda
