// The routing index on the GPU: a counting sort in one launch, the same bits on every run. Every warp owns a
// contiguous run of slots.
//   1. warps count their slots by bin; a block adds its warps up;
//   2. blocks exchange counts: in a cluster through distributed shared memory, in a cooperative grid through the
//      workspace, where each block also scans a share of the bins over all blocks;
//   3. warps walk their slots again, in order, and give every slot its row.
// Bins are the E experts and one for dropped slots.
#include "index.h"

#include <cooperative_groups.h>

#include <algorithm>

#include "cluster.cuh"

namespace moe::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarps = 16;
constexpr int64_t kRounds = 2;             // of slots for a warp, before another block joins
constexpr int kThreads = kWarps * kWarp;
constexpr int kCluster = 8;                // blocks, the most that every sm_90 takes
constexpr int64_t kClusterSlots = 1 << 16; // beyond this the whole device pays
constexpr int64_t kBlockSlots = 1 << 13;   // the same for a block by itself, where there are no clusters
constexpr int64_t kMaxBlocks = 256;        // of a grid

struct IndexLaunch : IndexParams {
  int32_t run;  // slots a warp owns, a multiple of the warp size
};

// As unsigned, every id outside [0, E) is too large, -1 included.
__device__ int bin_of(int32_t id, int experts) { return uint32_t(id) < uint32_t(experts) ? id : experts; }

// The active lanes with the same bin: a ballot a bit. (match.any takes a step for every distinct value.)
__device__ unsigned lanes_with(int bin, int bits, unsigned active) {
  unsigned peers = active;
  for (int b = 0; b < bits; ++b) {
    const bool set = bin >> b & 1;
    const unsigned with = __ballot_sync(active, set);
    peers &= set ? with : ~with;
  }
  return peers;
}

// Sum of the values of lower lanes; `total` becomes the sum over the warp.
__device__ int32_t warp_exclusive_sum(int32_t value, int32_t& total) {
  const int lane = threadIdx.x % kWarp;
  int32_t inclusive = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t lower = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += lower;
  }
  total = __shfl_sync(kAllLanes, inclusive, kWarp - 1);
  return inclusive - value;
}

// From counts[b], the block's own: lower[b] of the blocks before it, and totals[b] of all.
struct ClusterExchange {
  static constexpr bool kRoom = true;  // in shared memory, for the counts of every block

  static __device__ void prepare(Inbox& inbox) { inbox.prepare(); }
  static __device__ void run(const IndexLaunch&, Inbox& inbox, int bins, const int32_t* counts, int32_t* totals,
                             int32_t* lower, int32_t* room) {
    const unsigned rank = cluster_rank(), blocks = cluster_blocks();
    inbox.open();
    for (int b = threadIdx.x; b < bins; b += kThreads) {  // the thread that wrote counts[b]
      for (unsigned r = 0; r < blocks; ++r) inbox.send(room + rank * bins + b, counts[b], r);
    }
    inbox.receive(blocks * bins, 0);
    for (int b = threadIdx.x; b < bins; b += kThreads) {
      int32_t below = 0, all = 0;
#pragma unroll
      for (unsigned r = 0; r < kCluster; ++r) {
        if (r == blocks) break;
        const int32_t theirs = room[r * bins + b];
        below += r < rank ? theirs : 0;
        all += theirs;
      }
      lower[b] = below;
      totals[b] = all;
    }
    __syncthreads();
  }
};

// Workspace: counts (blocks, bins), then totals (bins).
struct GridExchange {
  static constexpr bool kRoom = false;

  static __device__ void prepare(Inbox&) {}
  static __device__ void run(const IndexLaunch& p, Inbox&, int bins, const int32_t* counts, int32_t* totals,
                             int32_t* lower, int32_t*) {
    cg::grid_group grid = cg::this_grid();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, blocks = gridDim.x;
    int32_t* const mine = p.workspace + int64_t(blockIdx.x) * bins;
    int32_t* const sums = p.workspace + int64_t(blocks) * bins;
    for (int b = threadIdx.x; b < bins; b += kThreads) mine[b] = counts[b];
    grid.sync();
    for (int b = blockIdx.x + warp * blocks; b < bins; b += kWarps * blocks) {  // a warp a bin
      int32_t before = 0, total;
      for (int first = 0; first < blocks; first += kWarp) {
        const int block = first + lane;
        int32_t* const theirs = p.workspace + int64_t(block) * bins + b;
        const int32_t below = warp_exclusive_sum(block < blocks ? *theirs : 0, total);
        if (block < blocks) *theirs = before + below;
        before += total;
      }
      if (lane == 0) sums[b] = before;
    }
    grid.sync();
    for (int b = threadIdx.x; b < bins; b += kThreads) {
      lower[b] = mine[b];
      totals[b] = sums[b];
    }
    __syncthreads();
  }
};

// A block of the first kind of Exchange is one of a cluster, of the second one of a grid.
template <class Exchange>
__global__ void __launch_bounds__(kThreads) index_kernel(const IndexLaunch p) {
  // counts, totals, lower (bins each), then a row of cursors a warp, then the exchange's room
  extern __shared__ int32_t shared[];
  const int bins = p.experts + 1, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t* const counts = shared;
  int32_t* const totals = counts + bins;
  int32_t* const lower = totals + bins;
  int32_t* const cursors = lower + bins;
  int32_t* const mine = cursors + warp * bins;
  int32_t* const room = cursors + kWarps * bins;
  __shared__ Inbox inbox;
  Exchange::prepare(inbox);

  for (int i = threadIdx.x; i < kWarps * bins; i += kThreads) cursors[i] = 0;
  __syncthreads();
  let_next_start();
  wait_for_previous();

  const int64_t begin = (int64_t(blockIdx.x) * kWarps + warp) * p.run;
  const int64_t end = min(begin + p.run, p.slots);
  for (int64_t slot = begin + lane; slot < end; slot += kWarp) {
    atomicAdd(&mine[bin_of(p.expert_ids[slot], p.experts)], 1);
  }
  __syncthreads();

  // A warp's cursor is what lower warps of the block hold.
  for (int b = threadIdx.x; b < bins; b += kThreads) {
    int32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int32_t theirs = cursors[w * bins + b];
      cursors[w * bins + b] = sum;
      sum += theirs;
    }
    counts[b] = sum;
  }
  Exchange::run(p, inbox, bins, counts, totals, lower, room);

  // totals[b] becomes the first row of the bin: a lane adds up its own bins, then the lanes are scanned.
  if (warp == 0) {
    const int each = ceil_div(bins, kWarp), begin_bin = lane * each, end_bin = min(begin_bin + each, bins);
    int32_t sum = 0, all;
    for (int b = begin_bin; b < end_bin; ++b) sum += totals[b];
    int32_t start = warp_exclusive_sum(sum, all);
    for (int b = begin_bin; b < end_bin; ++b) {
      const int32_t count = totals[b];
      totals[b] = start;
      if (blockIdx.x == 0) p.expert_offsets[b] = start;
      start += count;
    }
  }
  __syncthreads();
  for (int b = lane; b < bins; b += kWarp) mine[b] += totals[b] + lower[b];
  __syncwarp();

  const int bits = kWarp - __clz(p.experts);  // of a bin, 0 to E
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t slot = first + lane;
    const unsigned active = __ballot_sync(kAllLanes, slot < end);
    if (slot < end) {
      const int bin = bin_of(p.expert_ids[slot], p.experts);
      const unsigned peers = lanes_with(bin, bits, active);
      const int rank = __popc(peers & ((1u << lane) - 1));  // slots of this bin in lower lanes
      const int32_t row = mine[bin] + rank;
      p.perm[row] = int32_t(slot);
      p.inverse_perm[slot] = row;
      __syncwarp(active);  // all have read the cursors
      if (rank == 0) mine[bin] += __popc(peers);
    }
    __syncwarp();
  }
}

struct Shape {
  unsigned blocks;
  int32_t run;
};

Shape shape_for(int64_t slots, int64_t most_blocks) {
  constexpr int64_t kRound = kWarps * kWarp;  // slots of a block
  const int64_t blocks = std::clamp<int64_t>(ceil_div(slots, kRound * kRounds), 1, most_blocks);
  const int64_t run = std::max<int64_t>(ceil_div<int64_t>(ceil_div(slots, blocks * kWarps), kWarp), 1) * kWarp;
  return {unsigned(std::max<int64_t>(ceil_div(slots, run * kWarps), 1)), int32_t(run)};
}

template <class Exchange>
void launch(const IndexLaunch& p, unsigned blocks, const cudaLaunchAttribute* attributes, int count, Stream stream) {
  const auto kernel = index_kernel<Exchange>;
  const unsigned room = Exchange::kRoom ? blocks : 0;
  const size_t shared = sizeof(int32_t) * (3 + kWarps + room) * (p.experts + 1);
  if (shared > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = native(stream);
  config.attrs = const_cast<cudaLaunchAttribute*>(attributes);
  config.numAttrs = unsigned(count);
  cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

int64_t index_workspace(int64_t, int experts) { return (kMaxBlocks + 1) * int64_t(experts + 1); }

Status build_index(const IndexParams& params, Stream stream) {
  if (const Status status = check_sizes(params); !status.ok()) return status;
  const bool clusters = has_sm90(index_kernel<ClusterExchange>);
  if (params.slots <= (clusters ? kClusterSlots : kBlockSlots)) {
    const Shape shape = shape_for(params.slots, clusters ? kCluster : 1);
    cudaLaunchAttribute attributes[2] = {};
    set_cluster(attributes[0], shape.blocks);
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    launch<ClusterExchange>({params, shape.run}, shape.blocks, attributes, clusters ? 2 : 0, stream);
  } else {
    const int64_t most = std::min<int64_t>(multiprocessors(), kMaxBlocks);
    const Shape shape = shape_for(params.slots, most);
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    launch<GridExchange>({params, shape.run}, shape.blocks, &cooperative, 1, stream);
  }
  return launched();
}

}  // namespace moe::cuda
