// The grouped product on sm_90a: a block stays on its multiprocessor and takes tile after tile. One warp keeps stages
// of shared memory filled; two warpgroups each multiply 64 x 256 of a tile and send their sums out. In a cluster of
// two, blocks take neighbours along M and load half of their common B each, for both.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "ffn_epilogue.cuh"
#include "ffn_gather.cuh"

namespace moe::cuda::ffn {

constexpr int kThreads = (1 + kGroups) * kGroupThreads;
constexpr int kBoxesA = kTileM / kBox, kBoxesB = kTileN / kBox;
constexpr int kAhead = 4;  // blocks of the contraction before the end, where an epilogue asks for what it reads

template <class Epilogue>
struct KernelParams {
  CUtensorMap a, b;
  typename Epilogue::Params epilogue;
  Tiling tiling;
  int k_blocks;   // of the contraction; those of a weight gradient follow from the offsets
  Gather gather;  // of a kind that gathers A, in place of its map
};

// A kind of product. Of rows with weights: A are rows, K-major, and B weights. Of a weight gradient: both are rows,
// contracted over the rows of an expert, and so MN-major.
template <class Format_, class Epilogue_, bool kContractsRows_, Major kMajorB_, class Variant,
          bool kGathers_ = false>
struct Kind {
  using Format = Format_;
  using Epilogue = Epilogue_;
  using Exchange = typename Epilogue::template Exchange<Variant::kSlots>;
  using Params = KernelParams<Epilogue>;
  static constexpr bool kContractsRows = kContractsRows_, kGathers = kGathers_;
  static constexpr Major kMajorA = kContractsRows ? Major::MN : Major::K, kMajorB = kMajorB_;
  static constexpr int kCluster = Variant::kCluster, kStages = Variant::kStages, kSlots = Variant::kSlots;
  static constexpr int kLoadRegisters = kGathers ? 56 : 40;  // of a thread; a block has 64 K
  static constexpr int kComputeRegisters = kGathers ? 224 : 232;
};

template <class Kind>
struct alignas(1024) Storage {
  char a[Kind::kStages][kBoxesA][kBoxBytes];
  char b[Kind::kStages][kBoxesB][kBoxBytes];
  char slots[kGroups][Kind::kSlots][kBoxBytes];
  cutlass::arch::ClusterTransactionBarrier full[Kind::kStages];
  cutlass::arch::ClusterBarrier empty[Kind::kStages];
  cutlass::arch::ClusterTransactionBarrier loaded[kGroups][Kind::Exchange::kLoads > 0 ? Kind::Exchange::kLoads : 1];
};

// Stages in turn. A barrier's phase changes from one round to the next.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

template <class Kind>
__device__ __forceinline__ int blocks_of(const typename Kind::Params& p, const Tile& tile) {
  return Kind::kContractsRows ? ceil_div(tile.rows, kTileK) : p.k_blocks;
}

template <class Kind>
__device__ __forceinline__ BoxAt a_at(const Tile& tile, int k, int box) {
  if constexpr (Kind::kContractsRows) {
    return rows_at(tile.m * kTileM + box * kBox, 0, tile.row + k * kTileK, min(tile.rows - k * kTileK, kTileK));
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

template <class Kind>
__device__ __forceinline__ void load_b(const typename Kind::Params& p, Storage<Kind>& storage, const Tile& tile, int k,
                                       int stage, int rank) {
#pragma unroll
  for (int i = 0; i < kBoxesB / Kind::kCluster; ++i) {
    const int box = rank * (kBoxesB / Kind::kCluster) + i;
    load_box<(Kind::kCluster > 1)>(p.b, storage.full[stage], storage.b[stage][box], b_at<Kind>(tile, k, box));
  }
}

// One warp: its lanes find the tiles, the first loads them.
template <class Kind>
__device__ __forceinline__ void load_tiles(const typename Kind::Params& p, Storage<Kind>& storage, int rank) {
  Tiles<Kind::kContractsRows, Kind::kCluster> tiles(p.tiling, rank);
  Turn<Kind::kStages> turn;
  for (Tile tile; tiles.next(tile);) {
    const int k_blocks = blocks_of<Kind>(p, tile);
    if (threadIdx.x % kWarp == 0) {
#pragma unroll 1
      for (int k = 0; k < k_blocks; ++k, turn.advance()) {
        auto& full = storage.full[turn.stage];
        storage.empty[turn.stage].wait(turn.phase ^ 1);
        full.arrive_and_expect_tx((kBoxesA + kBoxesB) * kBoxBytes);
#pragma unroll
        for (int box = 0; box < kBoxesA; ++box) {
          load_box<false>(p.a, full, storage.a[turn.stage][box], a_at<Kind>(tile, k, box));
        }
        load_b<Kind>(p, storage, tile, k, turn.stage, rank);
      }
    }
    __syncwarp();
  }
}

// One warpgroup: all gather A, the first thread loads B.
template <class Kind>
__device__ __forceinline__ void gather_tiles(const typename Kind::Params& p, Storage<Kind>& storage, int rank) {
  Tiles<Kind::kContractsRows, Kind::kCluster> tiles(p.tiling, rank);
  Turn<Kind::kStages> turn;
  GatheredRows rows(p.gather);
  for (Tile tile; tiles.next(tile);) {
    rows.start_tile(tile);
#pragma unroll 1
    for (int k = 0; k < p.k_blocks; ++k, turn.advance()) {
      auto& full = storage.full[turn.stage];
      storage.empty[turn.stage].wait(turn.phase ^ 1);
      if (threadIdx.x == 0) {
        full.arrive_and_expect_tx(kBoxesB * kBoxBytes);
        load_b<Kind>(p, storage, tile, k, turn.stage, rank);
      }
      rows.copy(k, storage.a[turn.stage], full);
    }
    __syncwarp();
  }
}

// One warpgroup.
template <class Kind>
__device__ __forceinline__ void compute_tiles(const typename Kind::Params& p, Storage<Kind>& storage, int rank,
                                              int group) {
  using Format = typename Kind::Format;
  constexpr uint64_t kStageA = sizeof(storage.a[0]) / 16, kStageB = sizeof(storage.b[0]) / 16;  // in descriptors
  Tiles<Kind::kContractsRows, Kind::kCluster> tiles(p.tiling, rank);
  Turn<Kind::kStages> turn;
  typename Kind::Exchange exchange(storage, group);
  const int lane = threadIdx.x % kWarp;
  // Every warp tells every block that fills the stage.
  const auto release = [&](int stage) {
    if (Kind::kCluster > 1) {
      if (lane < Kind::kCluster) storage.empty[stage].arrive(lane);
    } else if (lane == 0) {
      storage.empty[stage].arrive();
    }
  };
  const uint64_t a = Operand<Kind::kMajorA>::descriptor(storage.a[0][group]);
  const uint64_t b = Operand<Kind::kMajorB>::descriptor(storage.b[0][0]);
  for (Tile tile; tiles.next(tile);) {
    const int k_blocks = blocks_of<Kind>(p, tile), whole = Kind::kContractsRows ? tile.rows / kTileK : k_blocks;
    typename Kind::Epilogue epilogue(p.epilogue, tile, group);
    if (!epilogue.active()) {  // a stage must be seen full before it is released
      for (int k = 0; k < k_blocks; ++k, turn.advance()) {
        storage.full[turn.stage].wait(turn.phase);
        release(turn.stage);
      }
      continue;
    }
    float sums[kSums];
    if (k_blocks == 0) {
#pragma unroll
      for (float& sum : sums) sum = 0.0f;
    }
    int last = 0;
    [[maybe_unused]] const int asks = max(k_blocks - kAhead, 0);
#pragma unroll 1
    for (int k = 0; k < whole; ++k, turn.advance()) {
      storage.full[turn.stage].wait(turn.phase);
      if constexpr (Kind::kGathers) cute::tma_store_fence();  // threads wrote what the product reads
      start_product<Format, Kind::kMajorA, Kind::kMajorB>(a + turn.stage * kStageA, b + turn.stage * kStageB, sums,
                                                          k == 0);
      if constexpr (Kind::Exchange::kLoads > 0) {
        if (k == asks) epilogue.ask(exchange);
      }
      cute::warpgroup_wait<1>();  // the product before this one has been read
      if (k > 0) release(last);
      last = turn.stage;
    }
    if constexpr (Kind::kContractsRows) {  // an expert's rows may end within a block: what follows is zeros
      if (whole < k_blocks) {
        storage.full[turn.stage].wait(turn.phase);
        const int steps = ceil_div(tile.rows - whole * kTileK, kTileK / kSteps);
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          start_product<Format, Kind::kMajorA, Kind::kMajorB, 1>(
              a + turn.stage * kStageA + step * Operand<Kind::kMajorA>::kStep,
              b + turn.stage * kStageB + step * Operand<Kind::kMajorB>::kStep, sums, whole + step == 0);
        }
        cute::warpgroup_wait<1>();
        if (whole > 0) release(last);
        last = turn.stage;
        turn.advance();
      }
    }
    cute::warpgroup_wait<0>();
#pragma unroll
    for (float& sum : sums) cute::warpgroup_fence_operand(sum);
    if (k_blocks > 0) release(last);
    epilogue.store(sums, exchange);
  }
  exchange.flush();
}

template <class Kind>
__global__ void __launch_bounds__(kThreads, 1) product_kernel(const __grid_constant__ typename Kind::Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char shared[];
  auto& storage = *reinterpret_cast<Storage<Kind>*>((reinterpret_cast<uintptr_t>(shared) + 1023) / 1024 * 1024);
  const int rank = Kind::kCluster > 1 ? int(cute::block_rank_in_cluster()) : 0;
  const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kGroupThreads, 0) - 1;  // -1 loads
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Kind::kStages; ++stage) {
      storage.full[stage].init(1 + (Kind::kGathers ? kGroupThreads : 0));
      storage.empty[stage].init(kGroups * (kGroupThreads / kWarp) * Kind::kCluster);
    }
    for (auto& loaded : storage.loaded) {
      for (auto& barrier : loaded) barrier.init(1);
    }
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (Kind::kCluster > 1) {
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  } else {
    __syncthreads();
  }
  let_next_start();
  wait_for_previous();
  if (group < 0) {
    cutlass::arch::warpgroup_reg_dealloc<Kind::kLoadRegisters>();
    if constexpr (Kind::kGathers) gather_tiles<Kind>(p, storage, rank);
    else if (threadIdx.x < kWarp) load_tiles<Kind>(p, storage, rank);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Kind::kComputeRegisters>();
    compute_tiles<Kind>(p, storage, rank, group);
  }
  if constexpr (Kind::kCluster > 1) {  // a block may not leave while another writes to it or counts in
    cute::cluster_arrive();
    cute::cluster_wait();
  }
#endif
}

}  // namespace moe::cuda::ffn
