// Which tiles of a grouped product a cluster computes, in which order. No table: a warp looks at 32 experts at a time,
// a lane each, and tiles only ever go forward.
#pragma once

#include "tensor_map.cuh"

namespace moe::cuda::ffn {

constexpr int kTileM = 128, kTileN = 256, kTileK = 64;

// Coordinates of a box in a tensor map.
struct BoxAt {
  int x, y, z, w;
};

// Up to 64 columns of the first `count` of 64 rows.
__device__ __forceinline__ BoxAt rows_at(int column, int part, int row, int count) {
  return {column, part, kBox - count, row + count};
}
__device__ __forceinline__ BoxAt weights_at(int input, int output, int part, int expert) {
  return {input, output, part, expert};
}

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
  int m, n;       // place in the product of one expert
};

// Tiles of one expert follow each other, so its operands stay in the L2 cache: kGroup tiles of M share a tile of N, and
// with it all tiles of N, before the next kGroup. A cluster takes kCluster neighbours along M.
template <bool kContractsRows, int kCluster>
class Tiles {
 public:
  __device__ Tiles(const Tiling& tiling, int rank) : tiling_(tiling), rank_(rank), next_(blockIdx.x / kCluster) {
    look();
  }

  // All lanes of the warp; false when there are no more.
  __device__ bool next(Tile& tile) {
    while (true) {
      const int in_batch = __shfl_sync(kAllLanes, through_, kWarp - 1);
      if (next_ - before_ < in_batch) break;
      before_ += in_batch;
      first_expert_ += kWarp;
      if (first_expert_ >= tiling_.experts) return false;
      look();
    }
    const int lane = __ffs(int(__ballot_sync(kAllLanes, next_ - before_ < through_))) - 1;
    const int units = __shfl_sync(kAllLanes, units_, lane);
    const int begin = __shfl_sync(kAllLanes, begin_, lane), count = __shfl_sync(kAllLanes, count_, lane);
    const int through = __shfl_sync(kAllLanes, through_, lane);
    const int index = next_ - before_ - (through - units * tiling_.n_tiles);
    const int group = index / (kGroup * tiling_.n_tiles), in_group = index - group * (kGroup * tiling_.n_tiles);
    const int height = min(kGroup, units - group * kGroup);
    tile.expert = first_expert_ + lane;
    tile.n = in_group / height;
    tile.m = (group * kGroup + in_group - tile.n * height) * kCluster + rank_;
    const int skipped = kContractsRows ? 0 : tile.m * kTileM;
    tile.row = begin + skipped;
    tile.rows = kContractsRows ? count : min(max(count - skipped, 0), kTileM);
    next_ += gridDim.x / kCluster;
    return true;
  }

 private:
  static constexpr int kGroup = 16 / kCluster;

  __device__ void look() {
    const int expert = first_expert_ + threadIdx.x % kWarp;
    const bool here = expert < tiling_.experts;
    begin_ = here ? min(tiling_.offsets[expert], tiling_.rows) : 0;
    count_ = here ? max(min(tiling_.offsets[expert + 1], tiling_.rows) - begin_, 0) : 0;
    units_ = ceil_div(kContractsRows ? tiling_.m_tiles : ceil_div(count_, kTileM), kCluster);
    if (!here) units_ = 0;
    through_ = units_ * tiling_.n_tiles;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int lower = __shfl_up_sync(kAllLanes, through_, step);
      if (threadIdx.x % kWarp >= step) through_ += lower;
    }
  }

  const Tiling tiling_;
  const int rank_;
  int next_, before_ = 0, first_expert_ = 0;      // tiles before the 32 experts from first_expert_ on
  int begin_ = 0, count_ = 0, units_ = 0, through_ = 0;  // of this lane's expert; tiles up to and with it
};

}  // namespace moe::cuda::ffn
