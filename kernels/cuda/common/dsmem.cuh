// Messages between the blocks of a cluster through distributed shared memory (sm_90): st.async completes at the receiver's
// mbarrier, so that no fence and no cluster-wide barrier is needed. Elsewhere a cluster is one block.
#pragma once

#include "common/launch.cuh"

namespace moe::cuda {

// Two mbarriers that complete when the expected bytes have arrived. Rounds count up from 0 and alternate between them: a
// block may be one round ahead of another. A single block just stores.
class DsmemMailbox {
 public:
  struct Barriers {
    unsigned long long barrier[2];
  };

  unsigned block = 0, blocks = 1;  // this block in its cluster, and how many they are

  // All threads of all blocks, with barriers in shared memory. Nothing may be sent before cluster_wait() has returned.
  __device__ explicit DsmemMailbox(Barriers& barriers) : barriers_(barriers) {
#if __CUDA_ARCH__ >= 900
    // Volatile: read once, and kept in a register.
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    if (threadIdx.x == 0) {
      for (auto& barrier : barriers.barrier) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&barrier)) : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  }
  __device__ void cluster_wait() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
  }

  // Stores four words at `to`, an aligned address of this block, in another block.
  __device__ void send(void* to, uint4 words, unsigned to_block, unsigned round) const {
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
              mapa(to, to_block)),
          "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(mapa(barrier(round), to_block))
          : "memory");
      return;
    }
#endif
    *static_cast<uint4*>(to) = words;
  }

  // All threads: the words to expect in this round, once the last round but one is over.
  __device__ void arrive_and_expect_tx(unsigned words, unsigned round) const {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0 && blocks > 1) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier(round))),
                   "r"(4 * words)
                   : "memory");
    }
#endif
  }
  // All threads: wait for them.
  __device__ void wait(unsigned round) const {
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      uint32_t done = 0;
      while (!done) {
        asm volatile(
            "{\n .reg .pred passed;\n"
            " mbarrier.try_wait.parity.shared::cta.b64 passed, [%1], %2;\n"
            " selp.u32 %0, 1, 0, passed;\n}"
            : "=r"(done)
            : "r"(address(barrier(round))), "r"(round / 2 % 2)
            : "memory");
      }
      return;
    }
#endif
    __syncthreads();
  }

 private:
#if __CUDA_ARCH__ >= 900
  static __device__ uint32_t address(const void* here) { return uint32_t(__cvta_generic_to_shared(here)); }
  // The same address in another block.
  static __device__ uint32_t mapa(const void* here, unsigned to_block) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(here)), "r"(to_block));
    return there;
  }
  __device__ const void* barrier(unsigned round) const { return &barriers_.barrier[round % 2]; }
#endif

  Barriers& barriers_;
};

}  // namespace moe::cuda
