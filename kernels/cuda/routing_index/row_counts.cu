// Counts for all-to-alls between ranks: four small kernels in place of about forty of torch's, each of which costs the host
// more time than all four cost the device.
#include "routing_index.h"

#include <algorithm>

#include "common/subwarp.cuh"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kManyThreads = 1024;  // of the one reducing block
constexpr int64_t kMostBlocks = 1 << 16;

// Peer order within a chunk: the other ranks in order, then this one.
__device__ int peer_order(int rank, const EpLayout& s) { return rank == s.rank ? s.ranks - 1 : rank - (rank > s.rank); }

__device__ int peer_at(int peer, const EpLayout& s) { return peer == s.ranks - 1 ? s.rank : peer + (peer >= s.rank); }

__global__ void __launch_bounds__(kThreads) bucket_slots_kernel(const BucketSlotsParams p) {
  launch_dependent_grids();
  wait_on_dependent_grids();
  const int local = p.layout.local_experts, groups = p.layout.groups, each = p.layout.chunk_experts();
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t slot = int64_t(blockIdx.x) * kThreads + threadIdx.x; slot < p.slots; slot += step) {
    const int32_t id = p.expert_ids[slot];
    if (uint32_t(id) >= uint32_t(p.layout.ranks * local)) {
      p.buckets[slot] = -1;
      continue;
    }
    const int32_t rank = id / local, expert = id % local;
    const int32_t chunk = int32_t(slot / p.chunk_slots) * groups + expert / each;
    p.buckets[slot] = (chunk * p.layout.ranks + peer_order(rank, p.layout)) * each + expert % each;
  }
}

__global__ void __launch_bounds__(kThreads) send_counts_kernel(const SendCountsParams p) {
  launch_dependent_grids();
  wait_on_dependent_grids();
  const int chunks = p.layout.chunks, each = p.layout.chunk_experts();
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= p.layout.ranks * chunks * each) return;
  const int to = i / (chunks * each), chunk = i / each % chunks, expert = i % each;
  const int32_t* const bucket = p.bucket_offsets + (chunk * p.layout.ranks + peer_order(to, p.layout)) * each + expert;
  p.send_counts[i] = bucket[1] - bucket[0];
}

// One warp per total, then one warp per chunk for its exclusive scan.
__global__ void __launch_bounds__(kManyThreads) recv_offsets_kernel(const RecvOffsetsParams p) {
  launch_dependent_grids();
  wait_on_dependent_grids();
  const int ranks = p.layout.ranks, chunks = p.layout.chunks, each = p.layout.chunk_experts();
  const int lane = threadIdx.x % kWarp, sums = 2 * chunks * ranks;
  for (int task = threadIdx.x / kWarp; task < sums + chunks; task += kManyThreads / kWarp) {
    if (task < sums) {
      const int chunk = task / ranks % chunks, other = task % ranks;
      const int32_t* const counts = (task < sums / 2 ? p.send_counts : p.recv_counts) + (other * chunks + chunk) * each;
      int32_t sum = 0;
      for (int e = lane; e < each; e += kWarp) sum += counts[e];
      sum = subwarp_sum<kWarp>(sum);
      if (lane == 0) p.totals[task] = sum;
      continue;
    }
    const int chunk = task - sums;
    int32_t* const offsets = p.offsets + chunk * (each + 1);
    int32_t before = 0, total;
    for (int first = 0; first < each; first += kWarp) {
      const int e = first + lane;
      int32_t count = 0;
      for (int from = 0; e < each && from < ranks; ++from) count += p.recv_counts[(from * chunks + chunk) * each + e];
      const int32_t lower = before + warp_exclusive_sum(count, total);
      if (e < each) offsets[e] = lower;
      before += total;
    }
    if (lane == 0) offsets[each] = before;
  }
}

// One block per segment: the rows of one chunk, rank and expert.
__global__ void __launch_bounds__(kThreads) recv_permutation_kernel(const RecvPermutationParams p) {
  launch_dependent_grids();
  wait_on_dependent_grids();
  const int chunks = p.layout.chunks, each = p.layout.chunk_experts(), peers = p.layout.ranks;
  const int chunk = blockIdx.x / (peers * each), peer = blockIdx.x / each % peers, expert = blockIdx.x % each;
  const auto count = [&](int c, int s, int e) { return p.recv_counts[(peer_at(s, p.layout) * chunks + c) * each + e]; };
  // Rows before this segment in arrival order, overall, and in expert order, within the chunk.
  __shared__ int32_t sums[2];
  if (threadIdx.x < 2) sums[threadIdx.x] = 0;
  __syncthreads();
  int32_t before = 0, ahead = 0;
  for (int i = threadIdx.x; i < int(blockIdx.x); i += kThreads) {
    before += count(i / (peers * each), i / each % peers, i % each);
  }
  for (int i = threadIdx.x; i < peers * (expert + 1); i += kThreads) {
    const int s = i % peers, e = i / peers;
    if (e < expert || s < peer) ahead += count(chunk, s, e);
  }
  before = subwarp_sum<kWarp>(before), ahead = subwarp_sum<kWarp>(ahead);
  if (threadIdx.x % kWarp == 0) atomicAdd(&sums[0], before), atomicAdd(&sums[1], ahead);
  __syncthreads();
  const int rows = count(chunk, peer, expert);
  for (int i = threadIdx.x; i < rows; i += kThreads) p.perm[sums[0] + i] = sums[1] + i;
}

}  // namespace

Status bucket_slots(const BucketSlotsParams& p, Stream stream) {
  if (const Status status = check_sizes(p.layout); !status.ok()) return status;
  if (p.slots < 0 || p.slots > INT32_MAX || p.chunk_slots < 1) return {Code::kSlots};
  if (p.slots == 0) return {};
  if ((p.slots - 1) / p.chunk_slots >= p.layout.chunks / p.layout.groups) return {Code::kLayout};
  const int64_t blocks = std::min(ceil_div<int64_t>(p.slots, kThreads), kMostBlocks);
  launch_pdl(bucket_slots_kernel, unsigned(blocks), kThreads, 0, stream, p);
  return last_error();
}

Status send_counts(const SendCountsParams& p, Stream stream) {
  if (const Status status = check_sizes(p.layout); !status.ok()) return status;
  launch_pdl(send_counts_kernel, unsigned(ceil_div(p.layout.buckets(), kThreads)), kThreads, 0, stream, p);
  return last_error();
}

Status recv_offsets(const RecvOffsetsParams& p, Stream stream) {
  if (const Status status = check_sizes(p.layout); !status.ok()) return status;
  launch_pdl(recv_offsets_kernel, 1, kManyThreads, 0, stream, p);
  return last_error();
}

Status recv_permutation(const RecvPermutationParams& p, Stream stream) {
  if (const Status status = check_sizes(p.layout); !status.ok()) return status;
  launch_pdl(recv_permutation_kernel, unsigned(p.layout.buckets()), kThreads, 0, stream, p);
  return last_error();
}

}  // namespace moe::cuda
