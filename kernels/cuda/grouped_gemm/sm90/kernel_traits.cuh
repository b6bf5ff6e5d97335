// The grouped GEMM's traits: tile configuration, parameters, shared memory, pipelines.
#pragma once

#include <algorithm>
#include <cute/arch/cluster_sm90.hpp>

#include "grouped_gemm/sm90/epilogue.cuh"

namespace moe::cuda::sm90 {

// Pipeline of work tiles from the producer warp, which schedules them, to the consumers. In shared memory.
struct WorkTileQueue {
  static constexpr int kStages = 4;  // as many as the mainloop's, for tiles of a single K tile

  WorkTile tiles[kStages];
  cutlass::arch::ClusterBarrier full[kStages], empty[kStages];

  __device__ void init(int consumer_warps) {
    for (int stage = 0; stage < kStages; ++stage) full[stage].init(1), empty[stage].init(consumer_warps);
  }

  // One thread. Tiles count from 0; after the last comes one with expert -1.
  __device__ __forceinline__ void producer_commit(const WorkTile& tile, int count) {
    const int stage = count % kStages;
    empty[stage].wait((count / kStages & 1) ^ 1);
    keep_order();
    tiles[stage] = tile;
    keep_order();
    full[stage].arrive();
  }

  // All lanes of each consumer warp; false after the last.
  __device__ __forceinline__ bool consumer_wait(WorkTile& tile, int count) {
    const int stage = count % kStages;
    full[stage].wait(count / kStages & 1);
    keep_order();
    tile = tiles[stage];
    __syncwarp();
    if (threadIdx.x % kWarp == 0) empty[stage].arrive();
    return tile.expert >= 0;
  }

 private:
  // The barrier instructions have no memory clobber.
  static __device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }
};

constexpr int kBoxesB = kTileN / kBox;

// Blocks per cluster (adjacent along M; they share B), mainloop stages, epilogue stages per warpgroup, and consumer
// warpgroups of 64 rows each.
template <int kCluster_, int kStages_, int kStagesD_, int kMmaWarpgroups_ = 2>
struct TileConfig {
  static constexpr int kCluster = kCluster_, kStages = kStages_, kStagesD = kStagesD_, kMmaWarpgroups = kMmaWarpgroups_;
};

template <class Epilogue>
struct KernelParams {
  CUtensorMap a, b;
  typename Epilogue::Params epilogue;
  ffn::TileSchedulerParams scheduler;
  int k_tiles;  // K-grouped: they follow from the offsets
};

// M-grouped: A are rows, K-major, and B weights. K-grouped (weight gradients): both are rows, contracted over the rows of
// an expert, and so MN-major.
template <class Format_, class Epilogue_, bool kKGrouped_, Major kMajorB_, class Config>
struct KernelTraits {
  using Format = Format_;
  using Epilogue = Epilogue_;
  using EpiloguePipeline = typename Epilogue::template Pipeline<Config::kStagesD>;
  using Params = KernelParams<Epilogue>;
  static constexpr bool kKGrouped = kKGrouped_;
  static constexpr Major kMajorA = kKGrouped ? Major::MN : Major::K, kMajorB = kMajorB_;
  static constexpr int kCluster = Config::kCluster, kStages = Config::kStages, kStagesD = Config::kStagesD;
  static constexpr int kMmaWarpgroups = Config::kMmaWarpgroups, kTileM = kMmaWarpgroups * kBox, kBoxesA = kMmaWarpgroups;
  static constexpr int kLoadedRows = kKGrouped ? kBox : kTileM;  // of A at a time
  static constexpr int kThreads = (1 + kMmaWarpgroups) * kWarpgroupThreads;
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static constexpr int kCompiledThreads = kWarp;  // compiled empty: see kernel_available
#else
  static constexpr int kCompiledThreads = kThreads;
#endif
  static constexpr int kAtomN = kMmaWarpgroups == 3 ? 128 : 256;  // N of one WGMMA
  static constexpr int kLoadRegisters = kMmaWarpgroups == 3 ? 32 : 40;  // per thread; a block has 64 K
  static constexpr int kComputeRegisters = kMmaWarpgroups == 3 ? 160 : 232;
  static_assert(kMmaWarpgroups == 2 || kMmaWarpgroups == 3);

  // Rank of this block in its cluster. Read each time: the producer has few registers.
  static __device__ __forceinline__ int rank() { return kCluster > 1 ? int(cute::block_rank_in_cluster()) : 0; }
};

template <class Traits>
struct alignas(1024) SharedStorage {
  char a[Traits::kStages][Traits::kBoxesA][kBoxBytes];
  char b[Traits::kStages][kBoxesB][kBoxBytes];
  char smem_d[Traits::kMmaWarpgroups][Traits::kStagesD][kBoxBytes];
  cutlass::arch::ClusterTransactionBarrier full[Traits::kStages];
  cutlass::arch::ClusterBarrier empty[Traits::kStages];
  cutlass::arch::ClusterTransactionBarrier full_c[Traits::kMmaWarpgroups][std::max(Traits::EpiloguePipeline::kStagesC, 1)];
  WorkTileQueue tile_queue;
};

// As cutlass::PipelineState: the stage's index, and the barrier's phase, which flips from one round to the next.
template <int kStages>
struct PipelineState {
  int index = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++index == kStages) index = 0, phase ^= 1;
  }
};

// K tiles of a work tile. An expert without rows has one of zeros, so that its weight gradient needs no special case.
template <class Traits>
__device__ __forceinline__ int k_tiles_of(const typename Traits::Params& p, const WorkTile& tile) {
  return Traits::kKGrouped ? max(ceil_div(tile.rows, kTileK), 1) : p.k_tiles;
}

}  // namespace moe::cuda::sm90
