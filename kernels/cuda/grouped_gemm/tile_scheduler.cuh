// Persistent tile scheduler of the grouped GEMM: which work tiles a cluster computes, in which order. No table in memory:
// a warp scans the offsets of 32 experts at a time, one lane each, and only ever moves forward.
#pragma once

#include "common/launch.cuh"

namespace moe::cuda::ffn {

struct TileSchedulerParams {
  const int32_t* offsets;  // (E + 1)
  int experts;
  int rows;     // N: offsets beyond are cut
  int m_tiles;  // K-grouped only; else they follow from the offsets
  int n_tiles;
};

struct WorkTile {
  int expert;
  int row, rows;  // the rows from `row` on that belong to this block's tile, or to the expert for a weight gradient
  int top;        // first row of this block within its expert
  int n;          // tile of columns
};

// Tiles of one expert follow each other, so that its operands stay in L2: kRasterGroupM tiles of M sweep all tiles of N
// before the next kRasterGroupM. The blocks of a cluster are adjacent along M.
//
// K-grouped tiles take as long as their expert has rows. They come in classes of these, largest first, and clusters take
// turns forwards and backwards (1 2 3 3 2 1 1 ...): under a load of max/mean 4 the last cluster then ends some 10 % after the
// mean, where in the order of the experts it ends 30 to 60 % after it.
template <class Traits>
class TileScheduler {
 public:
  explicit __device__ TileScheduler(const TileSchedulerParams& params)
      : params_(params), next_(blockIdx.x / Traits::kCluster), step_(2 * (gridDim.x / Traits::kCluster - next_) - 1) {}

  // All lanes of the warp; false when there are no more. The scan is repeated for each tile: it
  // costs little next to a tile, and holds no registers in between.
  __device__ bool next(WorkTile& tile) {
    int begin, count, inclusive;  // of this lane's expert; inclusive prefix sum of tiles
    while (true) {
      scan_groups(begin, count, inclusive);
      const int in_batch = __shfl_sync(kFullMask, inclusive, kWarp - 1);
      if (next_ < in_batch) break;
      next_ -= in_batch;
      first_expert_ += kWarp;
      if (first_expert_ < params_.experts) continue;
      if (++size_class_ >= kSizeClasses) return false;
      first_expert_ = 0;
    }
    const int lane = __ffs(int(__ballot_sync(kFullMask, next_ < inclusive))) - 1;
    begin = __shfl_sync(kFullMask, begin, lane);
    count = __shfl_sync(kFullMask, count, lane);
    inclusive = __shfl_sync(kFullMask, inclusive, lane);
    const int m_blocks = m_blocks_of(count), index = next_ - (inclusive - m_blocks * params_.n_tiles);
    const int group_tiles = kRasterGroupM * params_.n_tiles;
    const int group = index / group_tiles, in_group = index - group * group_tiles;
    const int height = min(kRasterGroupM, m_blocks - group * kRasterGroupM), n = in_group / height;
    const int m = group * kRasterGroupM + in_group - n * height;
    tile.expert = first_expert_ + lane;
    tile.n = n;
    tile.top = (m * Traits::kCluster + Traits::rank()) * Traits::kTileM;
    tile.row = begin + (Traits::kKGrouped ? 0 : tile.top);
    tile.rows = Traits::kKGrouped ? count : min(max(count - tile.top, 0), Traits::kTileM);
    if constexpr (Traits::kKGrouped) {
      next_ += step_;
      step_ = 2 * int(gridDim.x / Traits::kCluster) - step_;
    } else {
      next_ += gridDim.x / Traits::kCluster;
    }
    return true;
  }

 private:
  static constexpr int kRasterGroupM = 16 / Traits::kCluster;
  static constexpr int kSizeClasses = Traits::kKGrouped ? 12 : 1;  // half an octave each, from 8 times the mean on

  __device__ int size_class_of(int count) const {
    if constexpr (!Traits::kKGrouped) return 0;
    const float most = 8.0f * float(params_.rows) / float(params_.experts);
    return min(max(int(2.0f * __log2f(most / fmaxf(float(count), 1.0f))), 0), kSizeClasses - 1);
  }

  // M blocks of one expert, in units of a cluster.
  __device__ int m_blocks_of(int count) const {
    return ceil_div(Traits::kKGrouped ? params_.m_tiles : ceil_div(count, Traits::kTileM), Traits::kCluster);
  }

  __device__ void scan_groups(int& begin, int& count, int& inclusive) const {
    const int expert = first_expert_ + threadIdx.x % kWarp;
    const bool here = expert < params_.experts;
    begin = here ? min(params_.offsets[expert], params_.rows) : 0;
    count = here ? max(min(params_.offsets[expert + 1], params_.rows) - begin, 0) : 0;
    inclusive = here && size_class_of(count) == size_class_ ? m_blocks_of(count) * params_.n_tiles : 0;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int lower = __shfl_up_sync(kFullMask, inclusive, step);
      if (threadIdx.x % kWarp >= step) inclusive += lower;
    }
  }

  const TileSchedulerParams& params_;
  int next_, first_expert_ = 0;  // next tile, counted from the first tile of expert first_expert_
  int step_, size_class_ = 0;
};

}  // namespace moe::cuda::ffn
