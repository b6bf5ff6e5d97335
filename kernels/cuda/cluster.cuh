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

// Barriers in shared memory that are passed when the expected bytes have come. Turns count up from 0 and take two
// barriers in turn: a block that is a turn ahead of another must not be counted in before its time. A block by itself
// just stores.
class Inbox {
 public:
  // All threads of all blocks. Nothing may be sent before everyone has opened.
  __device__ void prepare() {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      for (auto& barrier : barriers_) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
      }
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

  // Puts a word, or four that lie together, at `to`, an address of this block, in the block of that rank.
  __device__ void send(int32_t* to, int32_t word, unsigned rank, unsigned turn) {
#if __CUDA_ARCH__ >= 900
    if (cluster_blocks() > 1) {
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(at(to, rank)),
                   "r"(word), "r"(at(&barriers_[turn % 2], rank))
                   : "memory");
      return;
    }
#endif
    *to = word;
  }
  __device__ void send(float* to, float4 words, unsigned rank, unsigned turn) {
#if __CUDA_ARCH__ >= 900
    if (cluster_blocks() > 1) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
              at(to, rank)),
          "r"(__float_as_uint(words.x)), "r"(__float_as_uint(words.y)), "r"(__float_as_uint(words.z)),
          "r"(__float_as_uint(words.w)), "r"(at(&barriers_[turn % 2], rank))
          : "memory");
      return;
    }
#endif
    *reinterpret_cast<float4*>(to) = words;
  }

  // All threads of the block: returns when so many words of the turn have come.
  __device__ void receive(unsigned words, unsigned turn) {
#if __CUDA_ARCH__ >= 900
    if (cluster_blocks() == 1) {
      __syncthreads();
      return;
    }
    const uint32_t barrier = shared_address(&barriers_[turn % 2]);
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
          : "r"(barrier), "r"(turn / 2 % 2)
          : "memory");
    }
#else
    __syncthreads();
#endif
  }

 private:
#if __CUDA_ARCH__ >= 900
  // The same place in another block.
  static __device__ uint32_t at(const void* here, unsigned rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(here)), "r"(rank));
    return there;
  }
#endif

  unsigned long long barriers_[2];
};

}  // namespace moe::cuda
