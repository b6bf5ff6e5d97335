// Tiles on their way from the warp that finds them to those that compute.
#pragma once

#include <cutlass/arch/barrier.h>

#include "grouped_gemm/tile_scheduler.cuh"

namespace moe::cuda::sm90 {

using ffn::Tile;

// In shared memory.
struct Board {
  static constexpr int kPlaces = 4;  // as many as stages, so that tiles of one block of the contraction fill them all

  Tile tiles[kPlaces];
  cutlass::arch::ClusterBarrier posted[kPlaces], taken[kPlaces];

  __device__ void init(int readers) {
    for (int place = 0; place < kPlaces; ++place) posted[place].init(1), taken[place].init(readers);
  }

  // One thread; the turn-th tile, from 0. After the last comes one of expert -1.
  __device__ __forceinline__ void post(const Tile& tile, int turn) {
    const int place = turn % kPlaces;
    taken[place].wait((turn / kPlaces & 1) ^ 1);
    keep_order();
    tiles[place] = tile;
    keep_order();
    posted[place].arrive();
  }

  // All lanes of each reading warp; false after the last.
  __device__ __forceinline__ bool take(Tile& tile, int turn) {
    const int place = turn % kPlaces;
    posted[place].wait(turn / kPlaces & 1);
    keep_order();
    tile = tiles[place];
    __syncwarp();
    if (threadIdx.x % kWarp == 0) taken[place].arrive();
    return tile.expert >= 0;
  }

 private:
  // The barriers' instructions do not tell the compiler that memory changes.
  static __device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }
};

}  // namespace moe::cuda::sm90
