// Flags that ranks raise with each other. A rank's stores before it raises a flag are seen by who has waited for it:
// release and acquire at system scope, and barriers of the block on either side.
#pragma once

#include "common/launch.cuh"
#include "push_pull.h"

namespace moe::cuda {

__device__ __forceinline__ void store_release(uint32_t* at, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ int64_t nanoseconds() {
  int64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// The host reads the write_error when a later call has failed.
__device__ __forceinline__ void set_error(const Signals& s, Fault fault, int detail) {
  volatile int32_t* const write_error = s.write_error;
  write_error[1] = detail;
  __threadfence_system();
  write_error[0] = int32_t(fault);
  __threadfence_system();
  __trap();
}

__device__ __forceinline__ uint32_t* flag_of(const Signals& s, int at_rank, int of_rank) {
  return reinterpret_cast<uint32_t*>(s.flags[at_rank]) + of_rank * kFlagWords;
}

// The epoch of the next_epoch that this launch takes part in: a new one for who signals, the last one for who only waits.
__device__ __forceinline__ uint32_t next_epoch(const Signals& s, int steps) {
  return *static_cast<volatile uint32_t*>(s.state) + (steps & kSignal ? 1 : 0);
}

// All threads of one block, one of them a rank at least; what the block has stored is told with the flags.
__device__ __forceinline__ void signal_peers(const Signals& s, uint32_t epoch) {
  __syncthreads();
  if (threadIdx.x == 0) *s.state = epoch;
  for (int rank = threadIdx.x; rank < s.ranks; rank += blockDim.x) {
    __threadfence_system();
    store_release(flag_of(s, rank, s.rank), epoch);
  }
}

// All threads of one block; what the other ranks stored before they raised their flags may be read after.
__device__ __forceinline__ void wait_for_peers(const Signals& s, uint32_t epoch) {
  constexpr int kLooks = 256;  // between two looks at the clock
  for (int rank = threadIdx.x; rank < s.ranks; rank += blockDim.x) {
    const uint32_t* const flag = flag_of(s, s.rank, rank);
    const int64_t began = nanoseconds();
    for (int looks = 1; int32_t(load_acquire(flag) - epoch) < 0; ++looks) {  // numbers may wrap
      if (looks % kLooks == 0 && nanoseconds() - began > s.timeout_ns) set_error(s, Fault::kTimeout, rank);
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void barrier(const Signals& s, int steps, uint32_t epoch) {
  if (steps & kSignal) signal_peers(s, epoch);
  if (steps & kWait) wait_for_peers(s, epoch);
}

}  // namespace moe::cuda
