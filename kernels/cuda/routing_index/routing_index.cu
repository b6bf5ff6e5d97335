// The routing index on the GPU: a counting sort in one launch, the same bits on every run. Every warp owns a contiguous
// run of slots.
//   1. warps walk their slots in order: each slot's position among those of its bin; a block adds its warps' counts up;
//   2. an exclusive scan across blocks: in a cluster through distributed shared memory, in a cooperative grid through the
//      workspace, where each block also scans a share of the bins over all blocks;
//   3. a slot's row is where its bin begins, plus what lower blocks and warps hold of the bin, plus its position.
//      Positions stay in registers; for a run too long for that they are computed again.
// Bins are the E experts and one for dropped slots.
#include "routing_index.h"

#include <algorithm>

#include "routing_index/cross_block_scan.cuh"

namespace moe::cuda {

using namespace index_detail;

namespace {

constexpr int64_t kClusterSlots = 1 << 14;  // beyond, a grid over the whole device is faster
constexpr int64_t kBlockSlots = 1 << 13;    // the same for one block, where there are no clusters
constexpr int64_t kMaxBlocks = 256;         // of a grid
constexpr int kStaticBytes = 1024;          // of shared memory, at most

// As unsigned, every id outside [0, E) is too large, -1 included.
__device__ int bin_of(int32_t id, int experts) { return uint32_t(id) < uint32_t(experts) ? id : experts; }

// A bin in one warp's run of slots.
struct alignas(8) WarpBin {
  uint32_t lanes;  // that hold it in this round
  int32_t count;   // so far; later, what lower warps of the block hold
};

// BlockScan: ClusterScan or GridScan. A run has at most kKept rounds, whose positions stay in registers; 0: any number.
template <class BlockScan, int kKept>
__global__ void __launch_bounds__(kThreads) index_kernel(const IndexLaunch p) {
  extern __shared__ __align__(16) int32_t shared[];
  const int bins = p.experts + 1, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int words = row_words(bins);
  int32_t* const begins = shared;  // of each bin's rows
  const RunningSums running{begins + words, begins + 2 * words};
  int32_t* const scan_smem = begins + 2 * words + kGroupWords;  // for the scan
  WarpBin* const warp_bins = reinterpret_cast<WarpBin*>(scan_smem + BlockScan::smem_words(words, gridDim.x));
  WarpBin* const mine = warp_bins + warp * bins;
  __shared__ DsmemMailbox::Barriers barriers;
  BlockScan scan(p, barriers, scan_smem);

  for (int b = lane; b < bins; b += kWarp) mine[b] = {};
  __syncwarp();
  launch_dependent_grids();
  wait_on_dependent_grids();

  const uint32_t slots = uint32_t(p.slots);
  const uint32_t begin = min((blockIdx.x * kWarps + warp) * uint32_t(p.run), slots);
  const uint32_t end = min(begin + p.run, slots);
  // The slot's position in the warp's run among those of its bin, whose count goes up.
  const auto take_position = [&](uint32_t slot, int bin) {
    if (slot < end) atomicOr(&mine[bin].lanes, 1u << lane);
    __syncwarp();
    const WarpBin held = mine[bin];
    const int lower = __popc(held.lanes & ((1u << lane) - 1));  // slots of this bin in lower lanes
    __syncwarp();  // all lanes have read
    if (slot < end && lower == 0) mine[bin] = {0, held.count + __popc(held.lanes)};
    __syncwarp();
    return held.count + lower;
  };
  int kept_bins[kKept + 1], kept_positions[kKept + 1];
  if constexpr (kKept > 0) {
    int32_t ids[kKept];  // all loaded before the first is used
#pragma unroll
    for (int r = 0; r < kKept; ++r) {
      const uint32_t slot = begin + r * kWarp + lane;
      ids[r] = slot < end ? p.expert_ids[slot] : -1;
    }
#pragma unroll
    for (int r = 0; r < kKept; ++r) {
      kept_bins[r] = bin_of(ids[r], p.experts);
      kept_positions[r] = take_position(begin + r * kWarp + lane, kept_bins[r]);
    }
  } else {
    for (uint32_t slot = begin + lane; slot < end; slot += kWarp) {
      atomicAdd(&mine[bin_of(p.expert_ids[slot], p.experts)].count, 1);
    }
  }
  __syncthreads();

  for (int first = warp * kWarp; first < words; first += kThreads) {
    const int b = first + lane;
    int32_t of_warp[kWarps], sum = 0, total;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) of_warp[w] = b < bins ? warp_bins[w * bins + b].count : 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (b < bins) warp_bins[w * bins + b].count = sum;
      sum += of_warp[w];
    }
    const int32_t lower = warp_exclusive_sum(sum, total);
    if (b < words) running.in_group[b] = lower;
    if (lane == 0) running.totals[first / kWarp] = total;
  }
  scan.open();
  __syncthreads();
  scan.send(running);
  scan.sync();
  for (int b = threadIdx.x; b < bins; b += kThreads) {
    begins[b] = scan.bin_start(b);
    if (blockIdx.x == 0) p.expert_offsets[b] = begins[b];
  }
  __syncthreads();

  const auto put = [&](uint32_t slot, int32_t row) {
    if (slot >= end) return;
    p.perm[row] = int32_t(slot);
    p.inverse_perm[slot] = row;
  };
  if constexpr (kKept > 0) {
    int32_t rows[kKept];
#pragma unroll
    for (int r = 0; r < kKept; ++r) rows[r] = begins[kept_bins[r]] + mine[kept_bins[r]].count + kept_positions[r];
#pragma unroll
    for (int r = 0; r < kKept; ++r) put(begin + r * kWarp + lane, rows[r]);
  } else {
    for (uint32_t first = begin; first < end; first += kWarp) {
      const uint32_t slot = first + lane;
      const int bin = slot < end ? bin_of(p.expert_ids[slot], p.experts) : p.experts;
      const int32_t position = take_position(slot, bin);
      put(slot, begins[bin] + position);
    }
  }
}

struct Shape {
  unsigned blocks;
  int32_t run;
};

Shape shape_for(int64_t slots, int64_t most_blocks) {
  constexpr int64_t kRound = kWarps * kWarp;  // slots of a block
  const int64_t blocks = std::clamp<int64_t>(ceil_div(slots, kRound), 1, most_blocks);
  const int64_t run = std::max<int64_t>(ceil_div<int64_t>(ceil_div(slots, blocks * kWarps), kWarp), 1) * kWarp;
  return {unsigned(std::max<int64_t>(ceil_div(slots, run * kWarps), 1)), int32_t(run)};
}

template <class BlockScan>
size_t shared_bytes(int experts, int blocks) {
  const int bins = experts + 1, words = row_words(bins);
  return sizeof(int32_t) * (2 * words + kGroupWords + BlockScan::smem_words(words, blocks)) +
         sizeof(WarpBin) * kWarps * bins;
}

constexpr int kRounds[] = {1, 2, 8, 9};  // one for each kernel

template <class BlockScan>
auto kernel_for(int32_t run) {
  if (run <= 1 * kWarp) return index_kernel<BlockScan, 1>;
  if (run <= 2 * kWarp) return index_kernel<BlockScan, 2>;
  if (run <= 8 * kWarp) return index_kernel<BlockScan, 8>;
  return index_kernel<BlockScan, 0>;
}

template <class BlockScan>
void allow_shared(int blocks) {
  int device = 0, most = 0;  // a device that has less takes fewer experts, and its runtime refuses the others
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  most = std::min(most - kStaticBytes, int(shared_bytes<BlockScan>(kMaxExperts, blocks)));
  for (const int rounds : kRounds) {
    cudaFuncSetAttribute(kernel_for<BlockScan>(rounds * kWarp), cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
}

// The most blocks of a cluster; opts the kernels into their shared memory the first time on a device.
int cluster_blocks() {
  static PerDevice<int> known;
  const int blocks = known.get([](int) {
    const bool clusters = has_sm90(index_kernel<ClusterScan, 1>);
    allow_shared<GridScan>(1);
    allow_shared<ClusterScan>(clusters ? kCluster : 1);
    if (!clusters) return 1;
    const size_t shared = shared_bytes<ClusterScan>(kMaxExperts, kCluster);
    int most = kCluster;
    for (const int rounds : kRounds) {
      most = std::min(most, largest_cluster(kernel_for<ClusterScan>(rounds * kWarp), kCluster, kThreads, shared));
    }
    return most;
  });
  return std::max(blocks, 1);
}

}  // namespace

int64_t index_workspace(int64_t, int experts) { return (kMaxBlocks + 1) * int64_t(experts + 2); }

Status build_index(const IndexParams& params, Stream stream) {
  if (const Status status = check_sizes(params); !status.ok()) return status;
  const int most_blocks = cluster_blocks();
  const bool clusters = most_blocks > 1, small = params.slots <= (clusters ? kClusterSlots : kBlockSlots);
  const Shape shape = shape_for(params.slots, small ? most_blocks : std::min<int64_t>(num_sms(), kMaxBlocks));
  const size_t shared = small ? shared_bytes<ClusterScan>(params.experts, int(shape.blocks))
                              : shared_bytes<GridScan>(params.experts, 1);
  Launch launch(shape.blocks, kThreads, shared, stream);
  if (small && clusters) launch.cluster(shape.blocks).pdl();
  if (!small) launch.cooperative();
  launch.run(small ? kernel_for<ClusterScan>(shape.run) : kernel_for<GridScan>(shape.run),
             IndexLaunch{params, shape.run});
  return last_error();
}

}  // namespace moe::cuda
