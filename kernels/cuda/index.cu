// The routing index on the GPU: a counting sort in one launch, the same bits on every run. Every warp owns a
// contiguous run of slots.
//   1. warps walk their slots in order: each slot's rank among those of its bin; a block adds its warps' counts up;
//   2. blocks exchange counts: in a cluster through distributed shared memory, in a cooperative grid through the
//      workspace, where each block also scans a share of the bins over all blocks;
//   3. a slot's row is where its bin begins, plus what lower blocks and warps hold of the bin, plus its rank. Ranks
//      wait in registers; of a run too long for that they are worked out again.
// Bins are the E experts and one for dropped slots.
#include "index.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <mutex>

#include "cluster.cuh"

namespace moe::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarps = 16;
constexpr int64_t kRounds = 1;             // of slots for a warp, before another block joins
constexpr int kThreads = kWarps * kWarp;
constexpr int kCluster = 16;               // blocks at most
constexpr int64_t kClusterSlots = 1 << 14; // beyond this the whole device pays
constexpr int64_t kBlockSlots = 1 << 13;   // the same for a block by itself, where there are no clusters
constexpr int64_t kMaxBlocks = 256;        // of a grid

struct IndexLaunch : IndexParams {
  int32_t run;  // slots a warp owns, a multiple of the warp size
};

// As unsigned, every id outside [0, E) is too large, -1 included.
__device__ int bin_of(int32_t id, int experts) { return uint32_t(id) < uint32_t(experts) ? id : experts; }

// A bin in one warp's run of slots.
struct alignas(8) WarpBin {
  uint32_t lanes;  // that hold it in this round
  int32_t count;   // so far; later, what lower warps of the block hold
};

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

// Sum of the values of lower threads; `total` becomes the sum over the block.
__device__ int32_t block_exclusive_sum(int32_t value, int32_t& total) {
  __shared__ int32_t sums[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t of_warp;
  const int32_t before = warp_exclusive_sum(value, of_warp);
  if (lane == 0) sums[warp] = of_warp;
  __syncthreads();
  const int32_t theirs = lane < kWarps ? sums[lane] : 0;
  total = __reduce_add_sync(kAllLanes, theirs);
  const int32_t lower = __reduce_add_sync(kAllLanes, lane < warp ? theirs : 0);
  __syncthreads();  // all have read the sums
  return before + lower;
}

// Bins of a row of counts that is moved by fours.
MOE_HD int padded(int bins) { return ceil_div(bins, 4) * 4; }

// A bin over the blocks: what those before this one hold, and all.
struct BinCount {
  int32_t below, all;
};

// From the block's own counts, in shared memory, a BinCount for each bin: send, meet, then ask.
class ClusterExchange {
 public:
  static MOE_HD int room(int width, int blocks) { return blocks * width; }

  // `room`: aligned to 16 bytes.
  __device__ ClusterExchange(const IndexLaunch& p, Inbox::Barriers& barriers, int32_t* room)
      : inbox_(barriers), room_(room), width_(padded(p.experts + 1)) {
    inbox_.expect(inbox_.blocks * width_, 0);
  }
  __device__ void open() { inbox_.open(); }
  __device__ void send(const int32_t* counts) {
    static_assert(kWarps == kCluster, "a warp for each receiver");
    const int lane = threadIdx.x % kWarp, to_rank = threadIdx.x / kWarp;
    if (to_rank >= inbox_.blocks) return;
    for (int b = 4 * lane; b < width_; b += 4 * kWarp) {
      inbox_.send(room_ + inbox_.rank * width_ + b, *reinterpret_cast<const uint4*>(counts + b), to_rank, 0);
    }
  }
  __device__ void meet() { inbox_.wait(0); }
  __device__ BinCount of(int bin) const {
    int32_t theirs[kCluster];  // all asked for before the first is looked at
#pragma unroll
    for (unsigned r = 0; r < kCluster; ++r) theirs[r] = r < inbox_.blocks ? room_[r * width_ + bin] : 0;
    BinCount count{};
#pragma unroll
    for (unsigned r = 0; r < kCluster; ++r) {
      count.below += r < inbox_.rank ? theirs[r] : 0;
      count.all += theirs[r];
    }
    return count;
  }

 private:
  Inbox inbox_;
  int32_t* room_;  // (blocks, width), in shared memory
  int width_;
};

class GridExchange {
 public:
  static MOE_HD int room(int, int) { return 0; }

  __device__ GridExchange(const IndexLaunch& p, Inbox::Barriers&, int32_t*)
      : bins_(p.experts + 1), counts_(p.workspace), totals_(p.workspace + int64_t(gridDim.x) * bins_) {}
  __device__ void open() {}
  __device__ void send(const int32_t* counts) {
    for (int b = threadIdx.x; b < bins_; b += kThreads) mine()[b] = counts[b];
  }
  __device__ void meet() {
    cg::grid_group grid = cg::this_grid();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, blocks = gridDim.x;
    grid.sync();
    for (int b = blockIdx.x + warp * blocks; b < bins_; b += kWarps * blocks) {  // a warp a bin
      int32_t before = 0, total;
      for (int first = 0; first < blocks; first += kWarp) {
        const int block = first + lane;
        int32_t* const theirs = counts_ + int64_t(block) * bins_ + b;
        const int32_t below = warp_exclusive_sum(block < blocks ? *theirs : 0, total);
        if (block < blocks) *theirs = before + below;
        before += total;
      }
      if (lane == 0) totals_[b] = before;
    }
    grid.sync();
  }
  __device__ BinCount of(int bin) const { return {mine()[bin], totals_[bin]}; }

 private:
  __device__ int32_t* mine() const { return counts_ + int64_t(blockIdx.x) * bins_; }
  int bins_;
  int32_t* counts_;  // (blocks, bins); after meeting, what the blocks before hold
  int32_t* totals_;  // (bins)
};

// A block of the first kind of Exchange is one of a cluster, of the second one of a grid. A run has kKept rounds at
// most, whose ranks wait in registers; with 0 it may have any number.
template <class Exchange, int kKept>
__global__ void __launch_bounds__(kThreads) index_kernel(const IndexLaunch p) {
  extern __shared__ __align__(16) int32_t shared[];
  const int bins = p.experts + 1, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t* const counts = shared;                // of the block; later, where each bin begins
  int32_t* const room = counts + padded(bins);   // for the exchange
  WarpBin* const warp_bins = reinterpret_cast<WarpBin*>(room + Exchange::room(padded(bins), gridDim.x));
  WarpBin* const mine = warp_bins + warp * bins;
  __shared__ Inbox::Barriers barriers;
  Exchange exchange(p, barriers, room);

  for (int b = lane; b < bins; b += kWarp) mine[b] = {};
  __syncwarp();
  let_next_start();
  wait_for_previous();

  const uint32_t slots = uint32_t(p.slots);
  const uint32_t begin = min((blockIdx.x * kWarps + warp) * uint32_t(p.run), slots);
  const uint32_t end = min(begin + p.run, slots);
  // The slot's rank in the warp's run among those of its bin, whose count goes up.
  const auto take_rank = [&](uint32_t slot, int bin) {
    if (slot < end) atomicOr(&mine[bin].lanes, 1u << lane);
    __syncwarp();
    const WarpBin found = mine[bin];
    const int lower = __popc(found.lanes & ((1u << lane) - 1));  // slots of this bin in lower lanes
    __syncwarp();  // all have read
    if (slot < end && lower == 0) mine[bin] = {0, found.count + __popc(found.lanes)};
    __syncwarp();
    return found.count + lower;
  };
  int kept_bins[kKept + 1], kept_ranks[kKept + 1];
  if constexpr (kKept > 0) {
    int32_t ids[kKept];  // all asked for before the first is looked at
#pragma unroll
    for (int r = 0; r < kKept; ++r) {
      const uint32_t slot = begin + r * kWarp + lane;
      ids[r] = slot < end ? p.expert_ids[slot] : -1;
    }
#pragma unroll
    for (int r = 0; r < kKept; ++r) {
      kept_bins[r] = bin_of(ids[r], p.experts);
      kept_ranks[r] = take_rank(begin + r * kWarp + lane, kept_bins[r]);
    }
  } else {
    for (uint32_t slot = begin + lane; slot < end; slot += kWarp) {
      atomicAdd(&mine[bin_of(p.expert_ids[slot], p.experts)].count, 1);
    }
  }
  __syncthreads();

  for (int b = threadIdx.x; b < bins; b += kThreads) {
    int32_t of_warp[kWarps], sum = 0;  // all asked for before the first is looked at
#pragma unroll
    for (int w = 0; w < kWarps; ++w) of_warp[w] = warp_bins[w * bins + b].count;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      warp_bins[w * bins + b].count = sum;
      sum += of_warp[w];
    }
    counts[b] = sum;
  }
  exchange.open();
  __syncthreads();
  exchange.send(counts);
  exchange.meet();
  int32_t before = 0;
  for (int first = 0; first < bins; first += kThreads) {
    const int b = first + threadIdx.x;
    int32_t sum;
    const BinCount count = b < bins ? exchange.of(b) : BinCount{};
    const int32_t start = before + block_exclusive_sum(count.all, sum);
    before += sum;
    if (b >= bins) continue;
    counts[b] = start + count.below;
    if (blockIdx.x == 0) p.expert_offsets[b] = start;
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
    for (int r = 0; r < kKept; ++r) rows[r] = counts[kept_bins[r]] + mine[kept_bins[r]].count + kept_ranks[r];
#pragma unroll
    for (int r = 0; r < kKept; ++r) put(begin + r * kWarp + lane, rows[r]);
  } else {
    for (uint32_t first = begin; first < end; first += kWarp) {
      const uint32_t slot = first + lane;
      const int bin = slot < end ? bin_of(p.expert_ids[slot], p.experts) : p.experts;
      const int32_t rank = take_rank(slot, bin);
      put(slot, counts[bin] + rank);
    }
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
size_t shared_bytes(int experts, int blocks) {
  const int bins = experts + 1, width = padded(bins);
  return sizeof(int32_t) * (width + Exchange::room(width, blocks)) + sizeof(WarpBin) * kWarps * bins;
}

template <class Exchange>
auto kernel_for(int32_t run) {
  if (run <= 1 * kWarp) return index_kernel<Exchange, 1>;
  if (run <= 2 * kWarp) return index_kernel<Exchange, 2>;
  if (run <= 8 * kWarp) return index_kernel<Exchange, 8>;
  return index_kernel<Exchange, 0>;
}

template <class Exchange>
void allow_shared(int blocks) {
  const int most = int(shared_bytes<Exchange>(kMaxExperts, blocks));
  for (const int rounds : {1, 2, 8, 9}) {
    cudaFuncSetAttribute(kernel_for<Exchange>(rounds * kWarp), cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
}

// The most blocks of a cluster; makes the kernels ready the first time on a device.
int cluster_blocks() {
  static int known[kMaxDevices];
  static std::mutex mutex;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return 1;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known[device] != 0) return known[device];
  const bool clusters = has_sm90(index_kernel<ClusterExchange, 1>);
  allow_shared<GridExchange>(1);
  allow_shared<ClusterExchange>(clusters ? kCluster : 1);
  int blocks = clusters ? kCluster : 1;
  for (const int rounds : {1, 2, 8, 9}) {
    if (!clusters) break;
    const size_t shared = shared_bytes<ClusterExchange>(kMaxExperts, kCluster);
    blocks = std::min(blocks, largest_cluster(kernel_for<ClusterExchange>(rounds * kWarp), kCluster, kThreads, shared));
  }
  return known[device] = blocks;
}

template <class Exchange>
void launch(const IndexLaunch& p, unsigned blocks, const cudaLaunchAttribute* attributes, int count, Stream stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes<Exchange>(p.experts, int(blocks));
  config.stream = native(stream);
  config.attrs = const_cast<cudaLaunchAttribute*>(attributes);
  config.numAttrs = unsigned(count);
  cudaLaunchKernelEx(&config, kernel_for<Exchange>(p.run), p);
}

}  // namespace

int64_t index_workspace(int64_t, int experts) { return (kMaxBlocks + 1) * int64_t(experts + 1); }

Status build_index(const IndexParams& params, Stream stream) {
  if (const Status status = check_sizes(params); !status.ok()) return status;
  const int most_blocks = cluster_blocks();
  const bool clusters = most_blocks > 1;
  if (params.slots <= (clusters ? kClusterSlots : kBlockSlots)) {
    const Shape shape = shape_for(params.slots, most_blocks);
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
