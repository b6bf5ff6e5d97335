// Which tiles of a grouped product a cluster computes, in which order. No table: a warp looks at 32 experts at a time,
// a lane each, and tiles only ever go forward.
#pragma once

#include "common/launch.cuh"

namespace moe::cuda::ffn {

struct Tiling {
  const int32_t* offsets;  // (E + 1)
  int experts;
  int rows;     // N: offsets beyond are cut
  int m_tiles;  // of a weight gradient; the rows' own tiles follow from the offsets
  int n_tiles;
};

struct Tile {
  int expert;
  int row, rows;  // the rows from `row` on that belong to this block's tile, or to the expert for a weight gradient
  int top;        // first row of the product that is the block's, in that of one expert
  int n;          // tile of columns
};

// Tiles of one expert follow each other, so its operands stay in the L2 cache: kGroup tiles of M share a tile of N, and
// with it all tiles of N, before the next kGroup. A cluster takes neighbours along M.
template <class Kind>
class Tiles {
 public:
  explicit __device__ Tiles(const Tiling& tiling) : tiling_(tiling), next_(blockIdx.x / Kind::kCluster) {}

  // All lanes of the warp; false when there are no more. What 32 experts have is looked up anew each time: it
  // takes little beside a tile, and no registers in between.
  __device__ bool next(Tile& tile) {
    int begin, count, through;  // of this lane's expert; tiles of the 32 experts up to and with it
    while (true) {
      look(begin, count, through);
      const int in_batch = __shfl_sync(kFullMask, through, kWarp - 1);
      if (next_ < in_batch) break;
      next_ -= in_batch;
      first_expert_ += kWarp;
      if (first_expert_ >= tiling_.experts) return false;
    }
    const int lane = __ffs(int(__ballot_sync(kFullMask, next_ < through))) - 1;
    begin = __shfl_sync(kFullMask, begin, lane);
    count = __shfl_sync(kFullMask, count, lane);
    through = __shfl_sync(kFullMask, through, lane);
    const int units = units_of(count), index = next_ - (through - units * tiling_.n_tiles);
    const int group = index / (kGroup * tiling_.n_tiles), in_group = index - group * (kGroup * tiling_.n_tiles);
    const int height = min(kGroup, units - group * kGroup), n = in_group / height;
    const int m = group * kGroup + in_group - n * height;
    tile.expert = first_expert_ + lane;
    tile.n = n;
    tile.top = (m * Kind::kCluster + Kind::rank()) * Kind::kTileM;
    tile.row = begin + (Kind::kContractsRows ? 0 : tile.top);
    tile.rows = Kind::kContractsRows ? count : min(max(count - tile.top, 0), Kind::kTileM);
    next_ += gridDim.x / Kind::kCluster;
    return true;
  }

 private:
  static constexpr int kGroup = 16 / Kind::kCluster;

  // Along M, of a cluster's height.
  __device__ int units_of(int count) const {
    return ceil_div(Kind::kContractsRows ? tiling_.m_tiles : ceil_div(count, Kind::kTileM), Kind::kCluster);
  }

  __device__ void look(int& begin, int& count, int& through) const {
    const int expert = first_expert_ + threadIdx.x % kWarp;
    const bool here = expert < tiling_.experts;
    begin = here ? min(tiling_.offsets[expert], tiling_.rows) : 0;
    count = here ? max(min(tiling_.offsets[expert + 1], tiling_.rows) - begin, 0) : 0;
    through = here ? units_of(count) * tiling_.n_tiles : 0;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int lower = __shfl_up_sync(kFullMask, through, step);
      if (threadIdx.x % kWarp >= step) through += lower;
    }
  }

  const Tiling& tiling_;
  int next_, first_expert_ = 0;  // counted from the first tile of the 32 experts from first_expert_ on
};

}  // namespace moe::cuda::ffn
