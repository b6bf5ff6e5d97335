// How a warpgroup's sums reach global memory: 64 x 64 values at a time through slots of shared memory, which the tensor
// memory accelerator empties while the warpgroup goes on.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>

#include "ffn_tiles.cuh"
#include "wgmma_tile.cuh"

namespace moe::cuda::ffn {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroups = 2;          // warpgroups that compute

// Waits for all threads of this warpgroup. Barrier 0 is the block's own.
__device__ __forceinline__ void sync_group(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
}

// A warpgroup's share of a tile, and a thread's share of that: in each 8 columns, two neighbours in row `low` and two
// in row low + 8.
struct Place {
  int group;      // warpgroup
  int row, rows;  // up to 64
  int low;        // of this thread, in [0, 64)
  int lane, warp;

  __device__ Place(int group_, const Tile& tile)
      : group(group_),
        row(tile.row + group_ * kBox),
        rows(min(max(tile.rows - group_ * kBox, 0), kBox)),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp % 4) {
    low = warp * 16 + lane / 4;
  }
};

// 64 x 64 values of a warpgroup as pairs: words[2 j + r] are columns 8 j + 2 (lane % 4) and the next of row low + 8 r.
struct Chunk {
  uint32_t words[16];
};

template <class Format>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<Format, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
  }
  return pair;
}

template <class Format>
__device__ __forceinline__ void unpack(uint32_t pair, float& first, float& second) {
  using Bits = typename Format::Bits;
  first = Format::to_real(Bits(pair & 0xffff));
  second = Format::to_real(Bits(pair >> 16));
}

// The address of this lane's row of four 8 x 8 matrices, columns 16 p to 16 p + 15 of its warp's 16 rows in a slot.
__device__ __forceinline__ uint32_t matrix_address(uint32_t slot, int warp, int lane, int p) {
  const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8, column = 2 * p + lane / 16;
  return slot + row * 128 + ((column ^ lane % 8) << 4);
}

// Words 4 p to 4 p + 3 of a chunk.
__device__ __forceinline__ void write_words(uint32_t slot, int warp, int lane, int p, const uint32_t* words) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   matrix_address(slot, warp, lane, p)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

__device__ __forceinline__ void read_words(uint32_t slot, int warp, int lane, int p, uint32_t* words) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(matrix_address(slot, warp, lane, p))
               : "memory");
}

__device__ __forceinline__ void write_chunk(uint32_t slot, int warp, int lane, const Chunk& chunk) {
#pragma unroll
  for (int p = 0; p < 4; ++p) write_words(slot, warp, lane, p, chunk.words + 4 * p);
}

// Fills a box of this block, or of both blocks of a pair, and counts the bytes in at their barriers.
template <bool kBoth>
__device__ __forceinline__ void load_box(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                         void* box, const BoxAt& at) {
  constexpr auto kHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  auto* const barrier = reinterpret_cast<uint64_t*>(&full);
  if constexpr (kBoth) {
    cute::SM90_TMA_LOAD_MULTICAST_4D::copy(&map, barrier, 3, kHint, box, at.x, at.y, at.z, at.w);
  } else {
    cute::SM90_TMA_LOAD_4D::copy(&map, barrier, kHint, box, at.x, at.y, at.z, at.w);
  }
}

// Brings a box into the L2 cache.
__device__ __forceinline__ void fetch_box(const CUtensorMap& map, const BoxAt& at) {
  cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&map, at.x, at.y, at.z, at.w);
}

__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t slot, const BoxAt& at) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(slot), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.w)
               : "memory");
}

// Slots in turn. A slot is used again when its last contents have left.
template <int kSlots>
class Outbox {
 public:
  static constexpr int kLoads = 0;

  template <class Storage>
  __device__ Outbox(Storage& storage, int group)
      : slots_(uint32_t(__cvta_generic_to_shared(storage.slots[group]))),
        group_(group),
        leads_(threadIdx.x % kGroupThreads == 0),
        warp_(threadIdx.x / kWarp % 4),
        lane_(threadIdx.x % kWarp) {}

  // All threads of the warpgroup. `store(slot)` starts the way of a slot out, in one thread.
  template <class Store>
  __device__ __forceinline__ void send(const Chunk& chunk, const Store& store) {
    const uint32_t slot = slots_ + turn_ * kBoxBytes;
    turn_ = turn_ + 1 == kSlots ? 0 : turn_ + 1;
    if (leads_) cute::tma_store_wait<kSlots - 1>();
    sync_group(group_);
    write_chunk(slot, warp_, lane_, chunk);
    cute::tma_store_fence();
    sync_group(group_);
    if (leads_) {
      store(slot);
      cute::tma_store_arrive();
    }
  }

  // Shared memory must outlive what is read from it.
  __device__ void flush() const {
    if (leads_) cute::tma_store_wait<0>();
  }

 private:
  const uint32_t slots_;
  const int group_;
  const bool leads_;
  const int warp_, lane_;
  int turn_ = 0;
};

}  // namespace moe::cuda::ffn
