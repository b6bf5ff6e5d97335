// Loads for a product whose rows are not there yet in expert order: each is taken from its token. A whole warpgroup
// copies 16 bytes a thread, which go where the tensor memory accelerator would have put them.
#pragma once

#include "ffn_sm90_outbox.cuh"

namespace moe::cuda::sm90 {

struct Gather {  // row r is tokens[slot_of_row[r] / top_k]
  const void* tokens;  // (T, width)
  const int32_t* slot_of_row;
  int top_k, width;
};

// A thread's share of A, the same 16 bytes of every sixteenth row.
template <int kTileM>
class GatheredRows {
 public:
  static constexpr int kLanes = kBox * 2 / 16, kStep = kGroupThreads / kLanes, kShare = kTileM / kStep;

  __device__ GatheredRows(const Gather& gather) : gather_(gather) {}

  __device__ __forceinline__ void start_tile(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int row = first() + i * kStep;
      tokens_[i] = row < tile.rows ? gather_.slot_of_row[tile.row + row] / gather_.top_k : -1;
    }
  }

  // Block k of the contraction, into the boxes of A from `to` on. Counts in at `full` when all of it is there.
  __device__ __forceinline__ void copy(int k, void* to, cutlass::arch::ClusterTransactionBarrier& full) const {
    const int piece = threadIdx.x % kLanes, column = k * kTileK + piece * 8;
    const auto* const from = static_cast<const char*>(gather_.tokens) + column * 2;
    const uint32_t slot = uint32_t(__cvta_generic_to_shared(to)) + first() * 128 + ((piece ^ first() % 8) << 4);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {  // zeros outside
      const bool inside = tokens_[i] >= 0 && column < gather_.width;
      const void* const source = inside ? from + int64_t(tokens_[i]) * gather_.width * 2 : gather_.tokens;
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(slot + i * kStep * 128), "l"(source),
                   "r"(inside ? 16 : 0)
                   : "memory");
    }
    cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<uint64_t*>(&full));
  }

 private:
  static __device__ int first() { return threadIdx.x % kGroupThreads / kLanes; }

  const Gather& gather_;
  int tokens_[kShare];
};

}  // namespace moe::cuda::sm90
