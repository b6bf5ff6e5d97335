// Exclusive scan across the blocks of the routing index: where each block's slots of a bin start.
#pragma once

#include <cooperative_groups.h>

#include "common/dsmem.cuh"
#include "common/subwarp.cuh"
#include "routing_index.h"

namespace moe::cuda::index_detail {

namespace cg = cooperative_groups;

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kCluster = 16;  // blocks at most

struct IndexLaunch : IndexParams {
  int32_t run;  // slots a warp owns, a multiple of the warp size
};

// Words of a row of running sums, one more than there are bins, that is moved by fours.
MOE_HD int row_words(int bins) { return ceil_div(bins + 1, 4) * 4; }

constexpr int kGroupWords = (kMaxExperts + 2) / kWarp / 4 * 4 + 4;  // of the groups of kWarp bins

// With X_r(b) the slots of block r in bins below b, block q's slots of bin b begin at row
//   sum_{r < q} X_r(b + 1) + sum_{r >= q} X_r(b):
// all in lower bins, and those of bin b in lower blocks. Every block sends its own X; all sync; then it reads.
class ClusterScan {
 public:
  static MOE_HD int smem_words(int words, int blocks) { return blocks * words; }

  // `smem`: aligned to 16 bytes.
  __device__ ClusterScan(const IndexLaunch& p, DsmemMailbox::Barriers& barriers, int32_t* smem)
      : mailbox_(barriers), smem_(smem), words_(row_words(p.experts + 1)) {}
  __device__ void open() {
    mailbox_.arrive_and_expect_tx(mailbox_.blocks * words_, 0);
    mailbox_.cluster_wait();
  }
  template <class Running>
  __device__ void send(const Running& running) {
    static_assert(kWarps == kCluster, "a warp for each receiver");
    const int lane = threadIdx.x % kWarp, to_block = threadIdx.x / kWarp;
    if (to_block >= mailbox_.blocks) return;
    for (int b = 4 * lane; b < words_; b += 4 * kWarp) {
      mailbox_.send(smem_ + mailbox_.block * words_ + b, running.four(b), to_block, 0);
    }
  }
  __device__ void sync() { mailbox_.wait(0); }
  __device__ int32_t bin_start(int bin) const {
    int32_t theirs[kCluster], sum = 0;  // all loaded before the first is used
#pragma unroll
    for (unsigned r = 0; r < kCluster; ++r) {
      theirs[r] = r < mailbox_.blocks ? smem_[r * words_ + bin + (r < mailbox_.block)] : 0;
    }
#pragma unroll
    for (unsigned r = 0; r < kCluster; ++r) sum += theirs[r];
    return sum;
  }

 private:
  DsmemMailbox mailbox_;
  int32_t* smem_;  // (blocks, words), in shared memory
  int words_;
};

class GridScan {
 public:
  static MOE_HD int smem_words(int, int) { return 0; }

  __device__ GridScan(const IndexLaunch& p, DsmemMailbox::Barriers&, int32_t*)
      : words_(p.experts + 2), sums_(p.workspace), totals_(p.workspace + int64_t(gridDim.x) * words_) {}
  __device__ void open() {}
  template <class Running>
  __device__ void send(const Running& running) {
    for (int b = threadIdx.x; b < words_; b += kThreads) mine()[b] = running.one(b);
  }
  __device__ void sync() {
    cg::grid_group grid = cg::this_grid();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, blocks = gridDim.x;
    grid.sync();
    for (int b = blockIdx.x + warp * blocks; b < words_; b += kWarps * blocks) {  // one warp per bin
      int32_t before = 0, total;
      for (int first = 0; first < blocks; first += kWarp) {
        const int block = first + lane;
        int32_t* const theirs = sums_ + int64_t(block) * words_ + b;
        const int32_t below = warp_exclusive_sum(block < blocks ? *theirs : 0, total);
        if (block < blocks) *theirs = before + below;
        before += total;
      }
      if (lane == 0) totals_[b] = before;
    }
    grid.sync();
  }
  __device__ int32_t bin_start(int bin) const { return mine()[bin + 1] + (totals_[bin] - mine()[bin]); }

 private:
  __device__ int32_t* mine() const { return sums_ + int64_t(blockIdx.x) * words_; }
  int words_;
  int32_t* sums_;    // (blocks, words); after sync, over the blocks before
  int32_t* totals_;  // (words)
};

// A block's running sums, made by groups of kWarp bins: the sum over lower bins of the group, and the groups' totals.
struct RunningSums {
  int32_t* in_group;  // (words)
  int32_t* totals;    // (groups)

  __device__ int32_t below(int b) const {
    int32_t sum = 0;
    for (int g = 0; g < b / kWarp; ++g) sum += totals[g];
    return sum;
  }
  __device__ int32_t one(int b) const { return in_group[b] + below(b); }
  __device__ uint4 four(int b) const {
    const int4 words = *reinterpret_cast<const int4*>(in_group + b);
    const int32_t lower = below(b);
    return make_uint4(words.x + lower, words.y + lower, words.z + lower, words.w + lower);
  }
};

}  // namespace moe::cuda::index_detail
