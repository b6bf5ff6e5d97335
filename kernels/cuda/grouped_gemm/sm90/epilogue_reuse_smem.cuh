// Slots for an epilogue that reads what belongs to its tile, and writes in its place: boxes come in while the product
// still runs, a warpgroup turns them into results where they lie, and they leave from there. Results without a box that
// came in have the last slot.
#pragma once

#include "grouped_gemm/sm90/epilogue_smem.cuh"

namespace moe::cuda::sm90 {

// kParts boxes come in at a time, into one of kLoads buffers.
template <int kParts, int kSlots>
class InPlace {
 public:
  static constexpr int kLoads = (kSlots - 1) / kParts;
  static_assert(kLoads >= 2, "too few slots to load ahead");

  template <class Storage>
  __device__ InPlace(Storage& storage, int group)
      : slots_(storage.slots[group][0]),
        loaded_(storage.loaded[group]),
        group_(group),
        leads_(threadIdx.x % kGroupThreads == 0),
        warp_(threadIdx.x / kWarp % 4),
        lane_(threadIdx.x % kWarp) {}

  // One thread of the warpgroup, which starts all loads and all stores.
  __device__ bool leads() const { return leads_; }

  // That thread, before it loads into buffers whose last contents are on their way out.
  __device__ void wait_until_sent() const { cute::tma_store_wait<0>(); }

  // That thread. `place(part)` is where the box of a part lies in the tensor.
  template <class Where>
  __device__ __forceinline__ void load(int buffer, const CUtensorMap& map, const Where& place) const {
    auto& loaded = loaded_[buffer];
    loaded.arrive_and_expect_tx(kParts * kBoxBytes);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      load_box<1>(map, loaded, slots_ + (buffer * kParts + part) * kBoxBytes, place(part));
    }
  }

  // All threads of the warpgroup, once for every load. `change(i, words)` is given the i-th words of the parts, and
  // turns them into what lies there next. Few words at a time: the sums of the tile hold most registers.
  template <class Change>
  __device__ __forceinline__ void receive(int buffer, const Change& change) {
    loaded_[buffer].wait(phases_ >> buffer & 1);
    phases_ ^= 1u << buffer;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      uint32_t words[kParts][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        read_words(address(buffer * kParts + part), warp_, lane_, p, words[part]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t of_parts[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part) of_parts[part] = words[part][i];
        change(4 * p + i, of_parts);
#pragma unroll
        for (int part = 0; part < kParts; ++part) words[part][i] = of_parts[part];
      }
      __syncwarp();  // a warp writes only where it has read
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        write_words(address(buffer * kParts + part), warp_, lane_, p, words[part]);
      }
    }
  }

  // All threads of the warpgroup, after receive(). One thread calls `sent()` when all that was sent before has left,
  // and then `store(slots, last)`, which starts the way out of the parts' slots and of the last one.
  template <class Sent, class Store>
  __device__ __forceinline__ void send(int buffer, const Chunk& result, const Sent& sent, const Store& store) const {
    if (leads_) {
      wait_until_sent();
      sent();
    }
    sync_group(group_);
    write_chunk(address(kSlots - 1), warp_, lane_, result);
    cute::tma_store_fence();
    sync_group(group_);
    if (leads_) {
      store(address(buffer * kParts), address(kSlots - 1));
      cute::tma_store_arrive();
    }
  }

  // Shared memory must outlive what is read from it.
  __device__ void flush() const {
    if (leads_) wait_until_sent();
  }

 private:
  __device__ uint32_t address(int slot) const {
    return uint32_t(__cvta_generic_to_shared(slots_)) + slot * kBoxBytes;
  }

  char* const slots_;
  cutlass::arch::ClusterTransactionBarrier* const loaded_;
  const int group_;
  const bool leads_;
  const int warp_, lane_;
  uint32_t phases_ = 0;  // a bit a buffer
};

}  // namespace moe::cuda::sm90
