// Blocks of a cluster that tell each other numbers (sm_90): remote stores that count themselves in at the receiver's
// barrier, so that no fence and no barrier of the whole cluster stands between. Elsewhere a cluster is one block.
#pragma once

#include "launch.cuh"

namespace moe::cuda {

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_blocks() {
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return uint32_t(__cvta_generic_to_shared(at));
}
#else
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_blocks() { return 1; }
#endif

// A barrier in shared memory that is passed when the expected bytes have come. A block by itself just stores.
class Inbox {
 public:
  // All threads of all blocks. Nothing may be sent before everyone has opened.
  __device__ void prepare() {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier_)) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  }
  __device__ void open() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
  }

  // Puts four bytes at `to`, an address of this block, in the block of that rank.
  template <class T>
  __device__ void send(T* to, T value, unsigned rank) {
    static_assert(sizeof(T) == 4, "one word at a time");
#if __CUDA_ARCH__ >= 900
    if (cluster_blocks() == 1) {
      *to = value;
      return;
    }
    uint32_t there, barrier;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(shared_address(&barrier_)), "r"(rank));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there),
                 "r"(bit_cast<uint32_t>(value)), "r"(barrier)
                 : "memory");
#else
    *to = value;
#endif
  }

  // All threads of the block: returns when so many words have come since the last time. `turn` alternates.
  __device__ void receive(unsigned words, unsigned turn) {
#if __CUDA_ARCH__ >= 900
    if (cluster_blocks() == 1) {
      __syncthreads();
      return;
    }
    const uint32_t barrier = shared_address(&barrier_);
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(4 * words) : "memory");
    }
    uint32_t done = 0;
    while (!done) {
      asm volatile(
          "{\n .reg .pred passed;\n"
          " mbarrier.try_wait.parity.shared::cta.b64 passed, [%1], %2;\n"
          " selp.u32 %0, 1, 0, passed;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(turn)
          : "memory");
    }
#else
    __syncthreads();
#endif
  }

 private:
  unsigned long long barrier_;
};

}  // namespace moe::cuda
