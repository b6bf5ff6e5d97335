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
constexpr int kKept = 16;                  // rounds whose ranks wait in registers
constexpr int kFewBits = 8, kAllBits = 11; // of a bin, 0 to E

struct IndexLaunch : IndexParams {
  int32_t run;  // slots a warp owns, a multiple of the warp size
};

// As unsigned, every id outside [0, E) is too large, -1 included.
__device__ int bin_of(int32_t id, int experts) { return uint32_t(id) < uint32_t(experts) ? id : experts; }

// The active lanes with the same bin: a ballot a bit. (match.any takes a step for every distinct value.)
template <int kBits>
__device__ unsigned lanes_with(int bin, unsigned active) {
  unsigned peers = active;
#pragma unroll
  for (int b = 0; b < kBits; ++b) {
    const bool set = bin >> b & 1;
    const unsigned with = __ballot_sync(kAllLanes, set);
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

// Sum of the values of lower threads; `total` becomes the sum over the block.
__device__ int32_t block_exclusive_sum(int32_t value, int32_t& total) {
  __shared__ int32_t sums[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t of_warp;
  const int32_t before = warp_exclusive_sum(value, of_warp);
  __syncthreads();  // all have read the last ones
  if (lane == 0) sums[warp] = of_warp;
  __syncthreads();
  const int32_t theirs = lane < kWarps ? sums[lane] : 0;
  total = __reduce_add_sync(kAllLanes, theirs);
  return before + __reduce_add_sync(kAllLanes, lane < warp ? theirs : 0);
}

// A bin over the blocks: what those before this one hold, and all.
struct BinCount {
  int32_t below, all;
};

// From the block's own counts, a BinCount for each bin: send all, meet, then ask.
class ClusterExchange {
 public:
  static constexpr bool kInShared = true;

  __device__ ClusterExchange(const IndexLaunch&, Inbox::Barriers& barriers, int32_t* room, int bins)
      : inbox_(barriers), room_(room), bins_(bins) {
    inbox_.expect(inbox_.blocks * bins, 0);
  }
  __device__ void open() { inbox_.open(); }
  __device__ void send(int bin, int32_t count) {
    for (unsigned r = 0; r < inbox_.blocks; ++r) inbox_.send(room_ + inbox_.rank * bins_ + bin, count, r, 0);
  }
  __device__ void meet() { inbox_.wait(0); }
  __device__ BinCount of(int bin) const {
    BinCount count{};
#pragma unroll
    for (unsigned r = 0; r < kCluster; ++r) {
      if (r == inbox_.blocks) break;
      const int32_t theirs = room_[r * bins_ + bin];
      count.below += r < inbox_.rank ? theirs : 0;
      count.all += theirs;
    }
    return count;
  }

 private:
  Inbox inbox_;
  int32_t* room_;  // (blocks, bins), in shared memory
  int bins_;
};

class GridExchange {
 public:
  static constexpr bool kInShared = false;

  __device__ GridExchange(const IndexLaunch& p, Inbox::Barriers&, int32_t*, int bins)
      : counts_(p.workspace), totals_(p.workspace + int64_t(gridDim.x) * bins), bins_(bins) {}
  __device__ void open() {}
  __device__ void send(int bin, int32_t count) { mine()[bin] = count; }
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
  int32_t* counts_;  // (blocks, bins); after meeting, what the blocks before hold
  int32_t* totals_;  // (bins)
  int bins_;
};

// A block of the first kind of Exchange is one of a cluster, of the second one of a grid.
template <class Exchange, int kBits>
__global__ void __launch_bounds__(kThreads) index_kernel(const IndexLaunch p) {
  extern __shared__ int32_t shared[];  // a row of counts for each warp, where each bin begins, the exchange's room
  const int bins = p.experts + 1, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t* const counts = shared;
  int32_t* const mine = counts + warp * bins;
  int32_t* const begins = counts + kWarps * bins;
  __shared__ Inbox::Barriers barriers;
  Exchange exchange(p, barriers, begins + bins, bins);

  for (int b = lane; b < bins; b += kWarp) mine[b] = 0;
  __syncwarp();
  let_next_start();
  wait_for_previous();

  const int64_t begin = (int64_t(blockIdx.x) * kWarps + warp) * p.run;
  const int64_t end = min(begin + p.run, p.slots);
  const auto bin_at = [&](int64_t slot) { return slot < end ? bin_of(p.expert_ids[slot], p.experts) : p.experts; };
  // The slot's rank in the warp's run among those of its bin, which its count in `mine` goes past.
  const auto take_rank = [&](int64_t slot, int bin) {
    const unsigned peers = lanes_with<kBits>(bin, __ballot_sync(kAllLanes, slot < end));
    const int lower = __popc(peers & ((1u << lane) - 1));  // slots of this bin in lower lanes
    const int32_t rank = mine[bin] + lower;
    __syncwarp();  // all have read the counts
    if (slot < end && lower == 0) mine[bin] += __popc(peers);
    __syncwarp();
    return rank;
  };
  const bool kept = p.run <= kKept * kWarp;
  int bin_of_round[kKept], rank_of_round[kKept];
  if (kept) {
#pragma unroll
    for (int r = 0; r < kKept; ++r) {
      if (r * kWarp >= p.run) break;
      bin_of_round[r] = bin_at(begin + r * kWarp + lane);
    }
#pragma unroll
    for (int r = 0; r < kKept; ++r) {
      if (r * kWarp >= p.run) break;
      rank_of_round[r] = take_rank(begin + r * kWarp + lane, bin_of_round[r]);
    }
  } else {
    for (int64_t slot = begin + lane; slot < end; slot += kWarp) atomicAdd(&mine[bin_at(slot)], 1);
  }
  __syncthreads();

  exchange.open();
  for (int b = threadIdx.x; b < bins; b += kThreads) {
    int32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {  // a warp's count becomes that of lower warps
      const int32_t theirs = counts[w * bins + b];
      counts[w * bins + b] = sum;
      sum += theirs;
    }
    exchange.send(b, sum);
  }
  exchange.meet();
  int32_t before = 0;
  for (int first = 0; first < bins; first += kThreads) {
    const int b = first + threadIdx.x;
    int32_t sum;
    const BinCount count = b < bins ? exchange.of(b) : BinCount{};
    const int32_t start = before + block_exclusive_sum(count.all, sum);
    before += sum;
    if (b >= bins) continue;
    begins[b] = start + count.below;
    if (blockIdx.x == 0) p.expert_offsets[b] = start;
  }
  __syncthreads();

  const auto put = [&](int64_t slot, int bin, int32_t rank) {
    if (slot >= end) return;
    const int32_t row = begins[bin] + rank;
    p.perm[row] = int32_t(slot);
    p.inverse_perm[slot] = row;
  };
  if (kept) {
#pragma unroll
    for (int r = 0; r < kKept; ++r) {
      if (r * kWarp >= p.run) break;
      const int bin = bin_of_round[r];
      put(begin + r * kWarp + lane, bin, mine[bin] + rank_of_round[r]);
    }
  } else {
    for (int64_t first = begin; first < end; first += kWarp) {
      const int64_t slot = first + lane;
      const int bin = bin_at(slot);
      put(slot, bin, take_rank(slot, bin));
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
void launch(const IndexLaunch& p, unsigned blocks, const cudaLaunchAttribute* attributes, int count, Stream stream) {
  const auto kernel = p.experts >> kFewBits == 0 ? index_kernel<Exchange, kFewBits> : index_kernel<Exchange, kAllBits>;
  const unsigned room = Exchange::kInShared ? blocks : 0;
  const size_t shared = sizeof(int32_t) * (kWarps + 1 + room) * (p.experts + 1);
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
  const bool clusters = has_sm90(index_kernel<ClusterExchange, kAllBits>);
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
