// How the operands of a grouped product come into shared memory.
#pragma once

#include "ffn_sm90_kind.cuh"

namespace moe::cuda::sm90 {

template <class Kind>
__device__ __forceinline__ BoxAt a_at(const Tile& tile, int k, int box) {
  if constexpr (Kind::kContractsRows) {
    return rows_at(tile.top + box * kBox, 0, tile.row + k * kTileK, min(tile.rows - k * kTileK, kTileK));
  } else {
    return rows_at(k * kTileK, 0, tile.row + box * kBox, min(tile.rows - box * kBox, kBox));
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

// A shared operand's boxes are loaded half by each block of a pair, for both.
template <class Kind>
__device__ __forceinline__ void load_a(const typename Kind::Params& p, Storage<Kind>& storage, const Tile& tile, int k,
                                       int stage) {
  constexpr int kLoads = Kind::kSharesA ? Kind::kBoxesA / 2 : Kind::kBoxesA;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int box = Kind::kSharesA ? Kind::rank() * kLoads + i : i;
    if (box < boxes_of<Kind>(tile)) {
      load_box<Kind::kSharesA>(p.a, storage.full[stage], storage.a[stage][box], a_at<Kind>(tile, k, box));
    }
  }
}

template <class Kind, class Visit>
__device__ __forceinline__ void visit_b(const Visit& visit) {
  constexpr int kLoads = Kind::kSharesB ? kBoxesB / 2 : kBoxesB;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) visit(Kind::kSharesB ? Kind::rank() * kLoads + i : i);
}

template <class Kind>
__device__ __forceinline__ void load_b(const typename Kind::Params& p, Storage<Kind>& storage, const Tile& tile, int k,
                                       int stage) {
  visit_b<Kind>([&](int box) {
    load_box<Kind::kSharesB>(p.b, storage.full[stage], storage.b[stage][box], b_at<Kind>(tile, k, box));
  });
}

// Before block k is loaded: brings the weights of later blocks into the L2 cache, those of a row one after the other.
template <class Kind>
__device__ __forceinline__ void fetch_b(const typename Kind::Params& p, const Tile& tile, int k, int k_blocks) {
  if (k % Kind::kFetches != 0) return;
  const int from = k == 0 ? Kind::kStages : k + Kind::kFetches, end = min(k + 2 * Kind::kFetches, k_blocks);
  visit_b<Kind>([&](int box) {
#pragma unroll 1
    for (int later = from; later < end; ++later) fetch_box(p.b, b_at<Kind>(tile, later, box));
  });
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
        storage.full[turn.stage].arrive_and_expect_tx((boxes_of<Kind>(tile) + kBoxesB) * kBoxBytes);
        load_a<Kind>(p, storage, tile, k, turn.stage);
        load_b<Kind>(p, storage, tile, k, turn.stage);
        if constexpr (Kind::kFetches > 0) fetch_b<Kind>(p, tile, k, k_blocks);
      }
      if constexpr (Kind::kEpilogueBlocks > 0) {
#pragma unroll 1
        for (int c = 0; c < Kind::kEpilogueBlocks; ++c, turn.advance()) {
          storage.empty[turn.stage].wait(turn.phase ^ 1);
          Kind::Epilogue::load(p.epilogue, storage, tile, c, turn.stage, boxes_of<Kind>(tile));
        }
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
        if constexpr (Kind::kFetches > 0) fetch_b<Kind>(p, tile, k, p.k_blocks);
      }
      rows.copy(k, storage.a[turn.stage], full);
    }
    __syncwarp();
  }
  if (threadIdx.x == 0) storage.board.post({-1}, posted);
}

}  // namespace moe::cuda::sm90
