// How the operands of a grouped product come into shared memory.
#pragma once

#include "grouped_gemm/sm90/kernel_traits.cuh"

namespace moe::cuda::sm90 {

template <class Kind>
__device__ __forceinline__ BoxAt b_at(const Tile& tile, int k, int box) {
  constexpr int kParts = Kind::Epilogue::kGated ? 2 : 1, kBoxesOfPart = kBoxesB / kParts;
  const int column = (tile.n * kBoxesOfPart + box % kBoxesOfPart) * kBox;
  if constexpr (Kind::kContractsRows) {
    return rows_at(column, 0, tile.row + k * kTileK, min(tile.rows - k * kTileK, kTileK));
  } else if constexpr (Kind::kMajorB == Major::MN) {
    return weights_at(column, k * kTileK, 0, tile.expert);
  } else {
    return weights_at(k * kTileK, column, box / kBoxesOfPart, tile.expert);
  }
}

// Rows that are not there become zeros: a load on a condition that is the same for a whole warp is miscompiled (nvcc 13.0
// moves its coordinates under the predicate of another load).
template <class Kind>
__device__ __forceinline__ void load_a(const typename Kind::Params& p, Storage<Kind>& storage, const Tile& tile, int k,
                                       int stage) {
  auto& full = storage.full[stage];
  if constexpr (Kind::kContractsRows) {
#pragma unroll
    for (int box = 0; box < Kind::kBoxesA; ++box) {
      const int rows = min(tile.rows - k * kTileK, kTileK);
      load_box<1>(p.a, full, storage.a[stage][box], rows_at(tile.top + box * kBox, 0, tile.row + k * kTileK, rows));
    }
  } else {
    load_box<1>(p.a, full, storage.a[stage], rows_at(k * kTileK, 0, tile.row, tile.rows));
  }
}

// Each block of a cluster loads a part of it, for all.
template <class Kind>
__device__ __forceinline__ void load_b(const typename Kind::Params& p, Storage<Kind>& storage, const Tile& tile, int k,
                                       int stage) {
  constexpr int kLoads = kBoxesB / Kind::kCluster;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int box = Kind::rank() * kLoads + i;
    load_box<Kind::kCluster>(p.b, storage.full[stage], storage.b[stage][box], b_at<Kind>(tile, k, box));
  }
}

// One warp: its lanes find the tiles, the first loads them.
template <class Kind>
__device__ __forceinline__ void load_tiles(const typename Kind::Params& p, Storage<Kind>& storage) {
  ffn::Tiles<Kind> tiles(p.tiling);
  Turn<Kind::kStages> turn;
  const bool loads = threadIdx.x % kWarp == 0;
  int posted = 0;
  for (Tile tile; tiles.next(tile); ++posted) {
    if (loads) {
      storage.board.post(tile, posted);
      const int k_blocks = blocks_of<Kind>(p, tile);
#pragma unroll 1
      for (int k = 0; k < k_blocks; ++k, turn.advance()) {
        storage.empty[turn.stage].wait(turn.phase ^ 1);
        storage.full[turn.stage].arrive_and_expect_tx((Kind::kBoxesA + kBoxesB) * kBoxBytes);
        load_a<Kind>(p, storage, tile, k, turn.stage);
        load_b<Kind>(p, storage, tile, k, turn.stage);
      }
    }
    __syncwarp();
  }
  if (loads) storage.board.post({-1}, posted);
}

}  // namespace moe::cuda::sm90
