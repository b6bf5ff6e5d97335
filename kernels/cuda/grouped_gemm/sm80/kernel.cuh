// The grouped GEMM on sm_80: persistent, tiles of 128 x (64 kWarpsN). All threads copy stages of both operands ahead
// (cp.async); each warp computes 64 x 64 of the tile. The first stages of the next tile are loaded during the epilogue.
#pragma once

#include "grouped_gemm/sm80/epilogue.cuh"

namespace moe::cuda::sm80 {

constexpr int kWarpsM = 2, kTileM = kWarpsM * kWarpTile;

template <class Epilogue>
struct KernelParams {
  const uint16_t *a, *b;
  typename Epilogue::Params epilogue;
  ffn::TileSchedulerParams scheduler;
  int outputs;     // K-grouped: rows of the output per expert
  int width;       // output columns of one part
  int contracted;  // K; K-grouped: the rows of an expert
};

template <int kWarpsN_, int kStages_, int kBlocks_>
struct TileConfig {
  static constexpr int kWarpsN = kWarpsN_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // per multiprocessor
};

// M-grouped: A are rows, K-major, and B weights. K-grouped (weight gradients): both are rows, contracted over the rows of
// an expert, and so MN-major.
template <class Format_, class Epilogue_, bool kKGrouped_, Major kMajorB_, class Config>
struct KernelTraits {
  using Format = Format_;
  using Epilogue = Epilogue_;
  using Params = KernelParams<Epilogue>;
  static constexpr bool kKGrouped = kKGrouped_;
  static constexpr Major kMajorA = kKGrouped ? Major::kMN : Major::kK, kMajorB = kMajorB_;
  static constexpr int kWarpsN = Config::kWarpsN, kStages = Config::kStages, kBlocks = Config::kBlocks;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp, kTileN = kWarpsN * kWarpTile;
  static constexpr int kTileColumns = Epilogue::kGated ? kTileN / 2 : kTileN;  // of one part, in a tile
  static constexpr int kStageA = kWarpsM * kBoxBytes, kStageB = kWarpsN * kBoxBytes;
  static constexpr int kStageBytes = kStageA + kStageB, kShared = kStages * kStageBytes;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static constexpr int kCompiledThreads = kWarp;  // compiled empty, see kernel_available: sm_90a has its own kernels
#else
  static constexpr int kCompiledThreads = kThreads;
#endif

  // For the tile scheduler.
  static constexpr int kTileM = sm80::kTileM, kCluster = 1;
  static __device__ int rank() { return 0; }
};

template <class Traits>
__device__ __forceinline__ int k_tiles_of(const typename Traits::Params& p, const WorkTile& tile) {
  return ceil_div(Traits::kKGrouped ? tile.rows : p.contracted, kTileK);
}

template <class Traits>
__device__ __forceinline__ Source a_of(const typename Traits::Params& p, const WorkTile& tile) {
  if constexpr (Traits::kKGrouped) {
    return {p.a + int64_t(tile.row) * p.outputs + tile.top, p.outputs - tile.top, tile.rows, p.outputs, 0};
  } else {
    return {p.a + int64_t(tile.row) * p.contracted, tile.rows, p.contracted, p.contracted, 0};
  }
}

template <class Traits>
__device__ __forceinline__ Source b_of(const typename Traits::Params& p, const WorkTile& tile) {
  const int column = tile.n * Traits::kTileColumns, columns = p.width - column;
  if constexpr (Traits::kKGrouped) {
    return {p.b + int64_t(tile.row) * p.width + column, columns, tile.rows, p.width, 0};
  } else {
    const int64_t part = int64_t(p.width) * p.contracted;
    const uint16_t* const weights = p.b + tile.expert * part * (Traits::Epilogue::kGated ? 2 : 1);
    if constexpr (Traits::kMajorB == Major::kMN) return {weights + column, columns, p.contracted, p.width, 0};
    else return {weights + int64_t(column) * p.contracted, columns, p.contracted, p.contracted, part};
  }
}

// A thread's copies for the current tile.
template <class Traits>
class Loads {
 public:
  __device__ Loads(const typename Traits::Params& p, uint32_t shared) : p_(p), shared_(shared) {}

  // All stages of the tile before must have been read.
  __device__ __forceinline__ void begin(const WorkTile& tile) {
    k_tiles_left_ = k_tiles_of<Traits>(p_, tile);
    a_.start(a_of<Traits>(p_, tile));
    b_.start(b_of<Traits>(p_, tile));
#pragma unroll
    for (int stage = 0; stage < Traits::kStages - 1; ++stage) next(stage * Traits::kStageBytes);
  }

  // One K tile, or nothing after the last; commits a group in any case, so that groups count K tiles.
  __device__ __forceinline__ void next(int offset) {
    if (k_tiles_left_ > 0) {
      a_.copy(shared_ + offset, p_.a);
      b_.copy(shared_ + offset + Traits::kStageA, p_.b);
      --k_tiles_left_;
    }
    commit_copies();
  }

 private:
  const typename Traits::Params& p_;
  const uint32_t shared_;
  int k_tiles_left_ = 0;
  Loader<Traits::kMajorA, kTileM, Traits::kThreads, false> a_;
  Loader<Traits::kMajorB, Traits::kTileN, Traits::kThreads, Traits::Epilogue::kGated> b_;
};

// Mainloop of one tile. Fragments of the next step are loaded while this one is multiplied. A warp without rows or columns
// of its own only copies.
template <class Traits>
__device__ __forceinline__ void mainloop(uint32_t shared, int k_tiles, bool active, int warp_m, int warp_n,
                                         Loads<Traits>& loads, Accumulators& acc) {
  const Fragments<Traits::kMajorA, true> a_fragments(warp_m);
  const Fragments<Traits::kMajorB, false> b_fragments(warp_n);
  uint32_t a[2][4][4], b[2][4][4];
  const auto load = [&](int offset, int step, bool valid) {
    if (!active || !valid) return;
    a_fragments.load(shared + offset, step, a[step % 2]);
    b_fragments.load(shared + offset + Traits::kStageA, step, b[step % 2]);
  };
  const auto wait_for_stage = [] {
    wait_for_copies<Traits::kStages - 2>();
    __syncthreads();
  };
  static_assert(kSteps % 2 == 0, "steps alternate between two sets of words");
  int from = 0, to = (Traits::kStages - 1) * Traits::kStageBytes;  // stages, as offsets
  const auto advance = [](int& offset) {
    offset = offset == Traits::kShared - Traits::kStageBytes ? 0 : offset + Traits::kStageBytes;
  };
  wait_for_stage();
  load(from, 0, k_tiles > 0);
#pragma unroll 1
  for (int k = 0; k < k_tiles; ++k) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == kSteps - 1) {  // all words of this stage are in registers: the next copy may overwrite it
        wait_for_stage();
        advance(from);
      }
      load(from, (step + 1) % kSteps, step < kSteps - 1 || k + 1 < k_tiles);
      if (step == 0) {
        loads.next(to);
        advance(to);
      }
      if (!active) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mma<typename Traits::Format>(acc[i][j], a[step % 2][i], b[step % 2][j / 2] + j % 2 * 2);
        }
      }
    }
  }
}

template <class Traits>
__device__ __forceinline__ OutputCoord output_coord(const typename Traits::Params& p, const WorkTile& tile, int warp_m, int warp_n) {
  const int lane = threadIdx.x % kWarp, row = warp_m * kWarpTile + lane / 4;
  OutputCoord at;
  at.row = (Traits::kKGrouped ? int64_t(tile.expert) * p.outputs + tile.top : tile.row) + row;
  at.column = tile.n * Traits::kTileColumns + warp_n * (Traits::kTileColumns / Traits::kWarpsN) + lane % 4 * 8;
  at.rows_left = (Traits::kKGrouped ? p.outputs - tile.top : tile.rows) - row;
  at.columns_left = p.width - at.column;
  at.width = p.width;
  return at;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kCompiledThreads, Traits::kBlocks)
    grouped_gemm_kernel(const __grid_constant__ typename Traits::Params p) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kParts = Traits::Epilogue::kGated ? 2 : 1;
  extern __shared__ __align__(128) char storage[];
  const auto shared = uint32_t(__cvta_generic_to_shared(storage));
  const int warp = __shfl_sync(kFullMask, int(threadIdx.x) / kWarp, 0);
  const int warp_m = warp / Traits::kWarpsN, warp_n = warp % Traits::kWarpsN;
  ffn::TileScheduler<Traits> tiles(p.scheduler);
  Loads<Traits> loads(p, shared);
  WorkTile tile;
  bool more = tiles.next(tile);
  if (more) loads.begin(tile);
  while (more) {
    const bool active = __any_sync(kFullMask, output_coord<Traits>(p, tile, warp_m, warp_n).has(0, 0));
    Accumulators acc = {};
    mainloop<Traits>(shared, k_tiles_of<Traits>(p, tile), active, warp_m, warp_n, loads, acc);
    typename Traits::Epilogue epilogue(p.epilogue, output_coord<Traits>(p, tile, warp_m, warp_n));  // prefetches its input
    more = tiles.next(tile);
    if (more) loads.begin(tile);
    if (!active) continue;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
#pragma unroll
      for (int c = 0; c < 2 / kParts; ++c) {
        float fragments[kParts][8];
#pragma unroll
        for (int part = 0; part < kParts; ++part) gather_fragment(acc, i, c + part, fragments[part]);
        epilogue.store(i, c, fragments);
      }
      epilogue.next_row();
    }
  }
#endif
}

}  // namespace moe::cuda::sm80
