// How the operands of a grouped product come into shared memory.
#pragma once

#include "ffn_sm90_kind.cuh"

namespace moe::cuda::sm90 {

template <class Kind>
__device__ __forceinline__ BoxAt a_at(const Tile& tile, int k, int box) {
  if constexpr (Kind::kContractsRows) {
    return rows_at(tile.top + box * kBox, 0, tile.row + k * kTileK, min(tile.rows - k * kTileK, kTileK));
  } else {
    return rows_at(k * kTileK, 0, tile.row + box * kBox, min(max(tile.rows - box * kBox, 0), kBox));
  }
}

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

// Boxes without rows are filled with zeros: a load on a condition that is the same for the whole warp is miscompiled
// (nvcc 13.0 moves its coordinates to uniform registers under the predicate of the load before).
template <class Kind>
__device__ __forceinline__ void load_a(const typename Kind::Params& p, Storage<Kind>& storage, const Tile& tile, int k,
                                       int stage) {
#pragma unroll
  for (int box = 0; box < Kind::kBoxesA; ++box) {
    load_box<false>(p.a, storage.full[stage], storage.a[stage][box], a_at<Kind>(tile, k, box));
  }
}

// Half of it by each block of a pair, for both.
template <class Kind>
__device__ __forceinline__ void load_b(const typename Kind::Params& p, Storage<Kind>& storage, const Tile& tile, int k,
                                       int stage) {
  constexpr int kLoads = kBoxesB / Kind::kCluster;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int box = Kind::rank() * kLoads + i;
    load_box<(Kind::kCluster > 1)>(p.b, storage.full[stage], storage.b[stage][box], b_at<Kind>(tile, k, box));
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

// One warpgroup: all gather A, the first thread loads B.
template <class Kind>
__device__ __forceinline__ void gather_tiles(const typename Kind::Params& p, Storage<Kind>& storage) {
  ffn::Tiles<Kind> tiles(p.tiling);
  Turn<Kind::kStages> turn;
  GatheredRows<Kind::kTileM> rows(p.gather);
  int posted = 0;
  for (Tile tile; tiles.next(tile); ++posted) {
    if (threadIdx.x == 0) storage.board.post(tile, posted);
    rows.start_tile(tile);
#pragma unroll 1
    for (int k = 0; k < p.k_blocks; ++k, turn.advance()) {
      auto& full = storage.full[turn.stage];
      storage.empty[turn.stage].wait(turn.phase ^ 1);
      if (threadIdx.x == 0) {
        full.arrive_and_expect_tx(kBoxesB * kBoxBytes);
        load_b<Kind>(p, storage, tile, k, turn.stage);
      }
      rows.copy(k, storage.a[turn.stage], full);
    }
    __syncwarp();
  }
  if (threadIdx.x == 0) storage.board.post({-1}, posted);
}

}  // namespace moe::cuda::sm90
