// Blocks of a cluster that tell each other numbers (sm_90): remote stores that count themselves in at the receiver's
// barrier, so that no fence and no barrier of the whole cluster stands between. Elsewhere a cluster is one block.
#pragma once

#include "common/launch.cuh"

namespace moe::cuda {

// Barriers in shared memory that are passed when the expected words have come. Turns count up from 0 and take two
// barriers in turn: a block that is a turn ahead of another must not be counted in before its time. A block by itself
// just stores.
class DsmemMailbox {
 public:
  struct Barriers {
    unsigned long long barrier[2];
  };

  unsigned rank = 0, blocks = 1;  // of this block, and of its cluster

  // All threads of all blocks, with barriers in shared memory. Nothing may be sent before open() has returned.
  __device__ explicit DsmemMailbox(Barriers& barriers) : barriers_(barriers) {
#if __CUDA_ARCH__ >= 900
    // Volatile: read once, and kept in a register.
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
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

  // Puts four words that lie together at `to`, an aligned address of this block, in the block of that rank.
  __device__ void send(void* to, uint4 words, unsigned to_rank, unsigned turn) const {
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
              mapa(to, to_rank)),
          "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(mapa(barrier(turn), to_rank))
          : "memory");
      return;
    }
#endif
    *static_cast<uint4*>(to) = words;
  }

  // All threads: how many words are to come in this turn, once the last turn but one is over.
  __device__ void arrive_and_expect_tx(unsigned words, unsigned turn) const {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0 && blocks > 1) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier(turn))),
                   "r"(4 * words)
                   : "memory");
    }
#endif
  }
  // All threads: until they have come.
  __device__ void wait(unsigned turn) const {
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      uint32_t done = 0;
      while (!done) {
        asm volatile(
            "{\n .reg .pred passed;\n"
            " mbarrier.try_wait.parity.shared::cta.b64 passed, [%1], %2;\n"
            " selp.u32 %0, 1, 0, passed;\n}"
            : "=r"(done)
            : "r"(address(barrier(turn))), "r"(turn / 2 % 2)
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
  // The same place in another block.
  static __device__ uint32_t mapa(const void* here, unsigned to_rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(here)), "r"(to_rank));
    return there;
  }
  __device__ const void* barrier(unsigned turn) const { return &barriers_.barrier[turn % 2]; }
#endif

  Barriers& barriers_;
};

}  // namespace moe::cuda
