// Epilogue staging: a warpgroup writes 64 x 64 values at a time to a stage of shared memory, which TMA stores to global
// memory while the warpgroup goes on.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>

#include "grouped_gemm/activation.cuh"
#include "grouped_gemm/sm90/wgmma.cuh"
#include "grouped_gemm/tile_scheduler.cuh"

namespace moe::cuda::sm90 {

using ffn::pack;
using ffn::WorkTile;
using ffn::unpack;

constexpr int kTileN = 256, kTileK = 64;  // kTileM is 64 rows per warpgroup

// Coordinates of a box in a tensor map.
struct TmaCoord {
  int x, y, z, w, v;
};

// Up to 64 columns of the first `count` of a box's rows.
__device__ __forceinline__ TmaCoord ragged_coord(int column, int part, int row, int count) {
  return {column, part, kRaggedSpan - count, row + count, kRaggedSpan};
}
__device__ __forceinline__ TmaCoord weight_coord(int input, int output, int part, int expert) {
  return {input, output, part, expert, 0};
}

constexpr int kWarpgroupThreads = 128, kWarpsPerWarpgroup = kWarpgroupThreads / kWarp;

// Waits for all threads of this warpgroup. Barrier 0 is the block's own.
__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, %1;" ::"r"(warpgroup + 1), "n"(kWarpgroupThreads) : "memory");
}

// A warpgroup's part of a tile, and a thread's part of that: in each 8 columns, two adjacent values in row `low` and two
// in row low + 8.
struct FragmentCoord {
  int warpgroup;
  int row, rows;  // up to 64
  int low;        // of this thread, in [0, 64)
  int lane, warp;

  __device__ FragmentCoord(int warpgroup_, const WorkTile& tile)
      : warpgroup(warpgroup_),
        row(tile.row + warpgroup_ * kBox),
        rows(min(max(tile.rows - warpgroup_ * kBox, 0), kBox)),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp % 4) {
    low = warp * 16 + lane / 4;
  }
};

// 64 x 64 values of a warpgroup as pairs: words[2 j + r] are columns 8 j + 2 (lane % 4) and the next of row low + 8 r.
struct PackedFragment {
  uint32_t words[16];
};

// The address of this lane's row of four 8 x 8 matrices, columns 16 p to 16 p + 15 of its warp's 16 rows in a stage.
__device__ __forceinline__ uint32_t matrix_address(uint32_t smem, int warp, int lane, int p) {
  const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8, column = 2 * p + lane / 16;
  return smem + row * 128 + ((column ^ lane % 8) << 4);
}

// Words 4 p to 4 p + 3 of a fragment.
__device__ __forceinline__ void stmatrix_x4(uint32_t smem, int warp, int lane, int p, const uint32_t* words) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   matrix_address(smem, warp, lane, p)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t smem, int warp, int lane, int p, uint32_t* words) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(matrix_address(smem, warp, lane, p))
               : "memory");
}

__device__ __forceinline__ void store_fragment(uint32_t smem, int warp, int lane, const PackedFragment& fragment) {
#pragma unroll
  for (int p = 0; p < 4; ++p) stmatrix_x4(smem, warp, lane, p, fragment.words + 4 * p);
}

// Fills a box of this block, or of all kBlocks of a cluster, and counts the bytes in at their barriers.
template <int kBlocks>
__device__ __forceinline__ void tma_load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                         void* box, const TmaCoord& at) {
  constexpr auto kHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  auto* const barrier = reinterpret_cast<uint64_t*>(&full);
  if constexpr (kBlocks > 1) {
    cute::SM90_TMA_LOAD_MULTICAST_5D::copy(&map, barrier, (1 << kBlocks) - 1, kHint, box, at.x, at.y, at.z, at.w, at.v);
  } else {
    cute::SM90_TMA_LOAD_5D::copy(&map, barrier, kHint, box, at.x, at.y, at.z, at.w, at.v);
  }
}

// Brings a box into the L2 cache.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap& map, const TmaCoord& at) {
  cute::SM90_TMA_LOAD_5D::PREFETCH::copy(&map, at.x, at.y, at.z, at.w, at.v);
}

__device__ __forceinline__ void tma_store(const CUtensorMap& map, uint32_t smem, const TmaCoord& at) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
               "r"(smem), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.w), "r"(at.v)
               : "memory");
}

// Adds the stage to what is there.
__device__ __forceinline__ void tma_add(const CUtensorMap& map, uint32_t smem, const TmaCoord& at) {
  asm volatile("cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(
                   &map),
               "r"(smem), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.w), "r"(at.v)
               : "memory");
}

// A warpgroup's stages of shared memory, each a box.
class EpilogueStages {
 public:
  // Shared memory must outlive what is read from it.
  __device__ void store_tail() const {
    if (is_leader_) cute::tma_store_wait<0>();
  }

 protected:
  template <class SharedStorage>
  __device__ EpilogueStages(SharedStorage& storage, int warpgroup)
      : smem_(storage.smem_d[warpgroup][0]),
        warpgroup_(warpgroup),
        is_leader_(threadIdx.x % kWarpgroupThreads == 0),
        warp_(threadIdx.x / kWarp % 4),
        lane_(threadIdx.x % kWarp) {}

  __device__ uint32_t address(int stage) const {
    return uint32_t(__cvta_generic_to_shared(smem_)) + stage * kBoxBytes;
  }

  char* const smem_;
  const int warpgroup_;
  const bool is_leader_;  // the thread that starts all loads and all stores
  const int warp_, lane_;
};

// A ring of stages: each is reused when its last store has been read out.
template <int kStagesD>
class TmaStorePipeline : public EpilogueStages {
 public:
  static constexpr int kStagesC = 0;  // no auxiliary input

  template <class SharedStorage>
  __device__ TmaStorePipeline(SharedStorage& storage, int warpgroup) : EpilogueStages(storage, warpgroup) {}

  // All threads of the warpgroup. `word(i)` makes the i-th word of a fragment, few at a time: the accumulators hold
  // most registers. `store(smem)` issues the TMA store of a stage, in one thread.
  template <class Word, class Store>
  __device__ __forceinline__ void commit(const Word& word, const Store& store) {
    fill_and_store(store, [&](uint32_t smem) {
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const uint32_t words[4] = {word(4 * p), word(4 * p + 1), word(4 * p + 2), word(4 * p + 3)};
        stmatrix_x4(smem, warp_, lane_, p, words);
      }
    });
  }

  // The same of 64 x 32 values in fp32: `pair(j, r)` are columns 8 j + 2 (lane % 4) and the next of row low + 8 r.
  template <class Pair, class Store>
  __device__ __forceinline__ void commit_fp32(const Pair& pair, const Store& store) {
    fill_and_store(store, [&](uint32_t smem) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = warp_ * 16 + lane_ / 4 + 8 * r, vector = 2 * j + lane_ % 4 / 2;  // of 16 bytes
          const float2 values = pair(j, r);
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(smem + row * kBoxRowBytes + ((vector ^ row % 8) << 4) +
                                                                lane_ % 2 * 8),
                       "f"(values.x), "f"(values.y)
                       : "memory");
        }
      }
    });
  }

 private:
  template <class Store, class Fill>
  __device__ __forceinline__ void fill_and_store(const Store& store, const Fill& fill) {
    const uint32_t smem = address(stage_);
    stage_ = stage_ + 1 == kStagesD ? 0 : stage_ + 1;
    if (is_leader_) cute::tma_store_wait<kStagesD - 1>();
    warpgroup_sync(warpgroup_);
    fill(smem);
    cute::tma_store_fence();
    warpgroup_sync(warpgroup_);
    if (is_leader_) {
      store(smem);
      cute::tma_store_arrive();
    }
  }

  int stage_ = 0;
};

// For an epilogue with an auxiliary input (ReuseSmemC): boxes are loaded while the mainloop still runs, a warpgroup
// transforms them in place, and they are stored from there. Outputs without a loaded box use the last stage. kParts boxes
// are loaded at a time, into one of kStagesC buffers.
template <int kParts, int kStagesD>
class ReuseSmemPipeline : public EpilogueStages {
 public:
  static constexpr int kStagesC = (kStagesD - 1) / kParts;
  static_assert(kStagesC >= 2, "too few stages to load ahead");

  template <class SharedStorage>
  __device__ ReuseSmemPipeline(SharedStorage& storage, int warpgroup)
      : EpilogueStages(storage, warpgroup), full_(storage.full_c[warpgroup]) {}

  __device__ bool is_leader() const { return is_leader_; }

  // The leader, before it loads into buffers that are still being stored.
  __device__ void store_wait() const { cute::tma_store_wait<0>(); }

  // The leader. `coord(part)` is where the box of a part lies in the tensor.
  template <class Coord>
  __device__ __forceinline__ void load(int buffer, const CUtensorMap& map, const Coord& coord) const {
    auto& full_c = full_[buffer];
    full_c.arrive_and_expect_tx(kParts * kBoxBytes);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      tma_load<1>(map, full_c, smem_ + (buffer * kParts + part) * kBoxBytes, coord(part));
    }
  }

  // All threads of the warpgroup, once for every load. `transform(i, words)` replaces the i-th words of the parts. Few
  // words at a time: the accumulators hold most registers.
  template <class Transform>
  __device__ __forceinline__ void consume(int buffer, const Transform& transform) {
    full_[buffer].wait(phases_ >> buffer & 1);
    phases_ ^= 1u << buffer;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      uint32_t words[kParts][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        ldmatrix_x4(address(buffer * kParts + part), warp_, lane_, p, words[part]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t of_parts[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part) of_parts[part] = words[part][i];
        transform(4 * p + i, of_parts);
#pragma unroll
        for (int part = 0; part < kParts; ++part) words[part][i] = of_parts[part];
      }
      __syncwarp();  // a warp writes only where it has read
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        stmatrix_x4(address(buffer * kParts + part), warp_, lane_, p, words[part]);
      }
    }
  }

  // All threads of the warpgroup, after consume(). One thread calls `on_stores_done()` when all earlier stores have been
  // read out, then `store(smem, last)`, which issues the stores of the parts' stages and of the last one.
  template <class OnStoresDone, class Store>
  __device__ __forceinline__ void commit(int buffer, const PackedFragment& result,
                                         const OnStoresDone& on_stores_done, const Store& store) const {
    if (is_leader_) {
      store_wait();
      on_stores_done();
    }
    warpgroup_sync(warpgroup_);
    store_fragment(address(kStagesD - 1), warp_, lane_, result);
    cute::tma_store_fence();
    warpgroup_sync(warpgroup_);
    if (is_leader_) {
      store(address(buffer * kParts), address(kStagesD - 1));
      cute::tma_store_arrive();
    }
  }

 private:
  cutlass::arch::ClusterTransactionBarrier* const full_;
  uint32_t phases_ = 0;  // one bit per buffer
};

}  // namespace moe::cuda::sm90
