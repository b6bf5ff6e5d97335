// The grouped GEMM on sm_90a: persistent and warp-specialised. A producer warp keeps the mainloop's stages filled by TMA;
// two or three consumer warpgroups each compute 64 x 256 of a tile and store it through the epilogue. The blocks of a
// cluster are adjacent along M; each loads a part of the common B and multicasts it.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "grouped_gemm/sm90/kernel_traits.cuh"

namespace moe::cuda::sm90 {

// ---- producer: operands into shared memory ---------------------------------------------------------------------

template <class Traits>
__device__ __forceinline__ TmaCoord b_coord(const WorkTile& tile, int k, int box) {
  constexpr int kParts = Traits::Epilogue::kGated ? 2 : 1, kBoxesOfPart = kBoxesB / kParts;
  const int column = (tile.n * kBoxesOfPart + box % kBoxesOfPart) * kBox;
  if constexpr (Traits::kKGrouped) {
    return ragged_coord(column, 0, tile.row + k * kTileK, min(tile.rows - k * kTileK, kTileK));
  } else if constexpr (Traits::kMajorB == Major::MN) {
    return weight_coord(column, k * kTileK, 0, tile.expert);
  } else {
    return weight_coord(k * kTileK, column, box / kBoxesOfPart, tile.expert);
  }
}

// Rows outside become zeros. Unconditional: a load under a condition that is uniform in the warp is miscompiled (nvcc 13.0
// moves its coordinates under the predicate of another load).
template <class Traits>
__device__ __forceinline__ void load_a(const typename Traits::Params& p, SharedStorage<Traits>& storage,
                                       const WorkTile& tile, int k, int stage) {
  auto& full = storage.full[stage];
  if constexpr (Traits::kKGrouped) {
#pragma unroll
    for (int box = 0; box < Traits::kBoxesA; ++box) {
      const int rows = min(tile.rows - k * kTileK, kTileK);
      tma_load<1>(p.a, full, storage.a[stage][box], ragged_coord(tile.top + box * kBox, 0, tile.row + k * kTileK, rows));
    }
  } else {
    tma_load<1>(p.a, full, storage.a[stage], ragged_coord(k * kTileK, 0, tile.row, tile.rows));
  }
}

// Each block of a cluster loads a part of B and multicasts it.
template <class Traits>
__device__ __forceinline__ void load_b(const typename Traits::Params& p, SharedStorage<Traits>& storage,
                                       const WorkTile& tile, int k, int stage) {
  constexpr int kBoxesPerBlock = kBoxesB / Traits::kCluster;
#pragma unroll
  for (int i = 0; i < kBoxesPerBlock; ++i) {
    const int box = Traits::rank() * kBoxesPerBlock + i;
    tma_load<Traits::kCluster>(p.b, storage.full[stage], storage.b[stage][box], b_coord<Traits>(tile, k, box));
  }
}

// One warp: its lanes find the tiles, the first loads them.
template <class Traits>
__device__ __forceinline__ void producer_warp(const typename Traits::Params& p, SharedStorage<Traits>& storage) {
  ffn::TileScheduler<Traits> tiles(p.scheduler);
  PipelineState<Traits::kStages> state;
  const bool loads = threadIdx.x % kWarp == 0;
  int count = 0;
  for (WorkTile tile; tiles.next(tile); ++count) {
    if (loads) {
      storage.tile_queue.producer_commit(tile, count);
      const int k_tiles = k_tiles_of<Traits>(p, tile);
#pragma unroll 1
      for (int k = 0; k < k_tiles; ++k, state.advance()) {
        storage.empty[state.index].wait(state.phase ^ 1);
        storage.full[state.index].arrive_and_expect_tx((Traits::kBoxesA + kBoxesB) * kBoxBytes);
        load_a<Traits>(p, storage, tile, k, state.index);
        load_b<Traits>(p, storage, tile, k, state.index);
      }
    }
    __syncwarp();
  }
  if (loads) storage.tile_queue.producer_commit({-1}, count);
}

// ---- consumers --------------------------------------------------------------------------------------------------

constexpr int kPrefetchDistance = 4;  // K tiles before the end at which the epilogue's input is loaded

// One warpgroup.
template <class Traits>
__device__ __forceinline__ void consumer_warpgroup(const typename Traits::Params& p, SharedStorage<Traits>& storage,
                                                   int warpgroup) {
  using Format = typename Traits::Format;
  PipelineState<Traits::kStages> state;
  typename Traits::EpiloguePipeline pipeline(storage, warpgroup);
  const int lane = threadIdx.x % kWarp;
  // Every warp arrives at the barrier of every block that fills the stage.
  const auto release = [&](int stage) {
    if (Traits::kCluster > 1) {
      if (lane < Traits::kCluster) storage.empty[stage].arrive(lane);
    } else if (lane == 0) {
      storage.empty[stage].arrive();
    }
  };
  const auto a = [&](int stage) { return Operand<Traits::kMajorA>::descriptor(storage.a[stage][warpgroup]); };
  const auto b = [&](int stage) { return Operand<Traits::kMajorB>::descriptor(storage.b[stage][0]); };
  WorkTile tile;
#pragma unroll 1
  for (int count = 0; storage.tile_queue.consumer_wait(tile, count); ++count) {
    const int k_tiles = k_tiles_of<Traits>(p, tile), whole = Traits::kKGrouped ? tile.rows / kTileK : k_tiles;
    typename Traits::Epilogue epilogue(p.epilogue, tile, warpgroup);
    if (!epilogue.active()) {  // a stage must be seen full before it is released
      for (int k = 0; k < k_tiles; ++k, state.advance()) {
        storage.full[state.index].wait(state.phase);
        release(state.index);
      }
      continue;
    }
    float acc[kAccRegs];
    int last = 0;
    [[maybe_unused]] const int prefetch_at = max(k_tiles - kPrefetchDistance, 0);
#pragma unroll 1
    for (int k = 0; k < whole; ++k, state.advance()) {
      storage.full[state.index].wait(state.phase);
      wgmma_async<Format, Traits::kMajorA, Traits::kMajorB, Traits::kAtomN>(
          a(state.index), b(state.index), acc, k == 0);
      if constexpr (Traits::EpiloguePipeline::kStagesC > 0) {
        if (k == prefetch_at) epilogue.prefetch_aux(pipeline);
      }
      cute::warpgroup_wait<1>();  // the WGMMA before this one has read its stage
      if (k > 0) release(last);
      last = state.index;
    }
    if constexpr (Traits::kKGrouped) {  // an expert's rows may end within a K tile: the rest is zeros
      if (whole < k_tiles) {
        storage.full[state.index].wait(state.phase);
        const int steps = max(ceil_div(tile.rows - whole * kTileK, kTileK / kKAtoms), 1);
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          wgmma_async<Format, Traits::kMajorA, Traits::kMajorB, Traits::kAtomN, 1>(
              a(state.index) + step * Operand<Traits::kMajorA>::kAtomStride,
              b(state.index) + step * Operand<Traits::kMajorB>::kAtomStride, acc, whole + step == 0);
        }
        cute::warpgroup_wait<1>();
        if (whole > 0) release(last);
        last = state.index;
        state.advance();
      }
    }
    cute::warpgroup_wait<0>();
#pragma unroll
    for (float& value : acc) cute::warpgroup_fence_operand(value);
    release(last);
    epilogue.store(acc, pipeline);
  }
  pipeline.store_tail();
}

template <class Traits>
__device__ __forceinline__ void init_barriers(SharedStorage<Traits>& storage) {
  for (int stage = 0; stage < Traits::kStages; ++stage) {
    storage.full[stage].init(1);
    storage.empty[stage].init(Traits::kMmaWarpgroups * kWarpsPerWarpgroup * Traits::kCluster);
  }
  for (auto& full_c : storage.full_c) {
    for (auto& barrier : full_c) barrier.init(1);
  }
  storage.tile_queue.init(Traits::kMmaWarpgroups * kWarpsPerWarpgroup);
  cutlass::arch::fence_barrier_init();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kCompiledThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ typename Traits::Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char shared[];
  auto& storage = *reinterpret_cast<SharedStorage<Traits>*>((reinterpret_cast<uintptr_t>(shared) + 1023) / 1024 * 1024);
  const int warpgroup = __shfl_sync(kFullMask, int(threadIdx.x) / kWarpgroupThreads, 0) - 1;  // -1: producer
  if (threadIdx.x == 0) init_barriers(storage);
  if constexpr (Traits::kCluster > 1) {
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  } else {
    __syncthreads();
  }
  launch_dependent_grids();
  wait_on_dependent_grids();
  if (warpgroup < 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kLoadRegisters>();
    if (threadIdx.x < kWarp) producer_warp<Traits>(p, storage);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kComputeRegisters>();
    consumer_warpgroup<Traits>(p, storage, warpgroup);
  }
  if constexpr (Traits::kCluster > 1) {  // no block may exit while another one still writes to it or arrives at its barriers
    cute::cluster_arrive();
    cute::cluster_wait();
  }
#endif
}

}  // namespace moe::cuda::sm90
