// The signal pad: flags that ranks set in each other's memory. A rank's stores before it signals are visible to
// those that have waited: release and acquire at system scope, and block barriers on either side.
#pragma once

#include "common/launch.cuh"
#include "symmetric.h"

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

// The host reads the error once a later call has failed.
__device__ __forceinline__ void set_error(const Signals& s, Fault fault, int detail) {
  volatile int32_t* const error = s.error;
  error[1] = detail;
  __threadfence_system();
  error[0] = int32_t(fault);
  __threadfence_system();
  __trap();
}

__device__ __forceinline__ uint32_t* flag_of(const Signals& s, int at_rank, int of_rank) {
  return reinterpret_cast<uint32_t*>(s.flags[at_rank]) + of_rank * kFlagWords;
}

// The epoch of this launch's barrier: a new one for a launch that signals, the last one for a launch that only waits.
__device__ __forceinline__ uint32_t next_epoch(const Signals& s, int steps) {
  return *static_cast<volatile uint32_t*>(s.state) + (steps & kSignal ? 1 : 0);
}

// All threads of one block; publishes what the block has stored.
__device__ __forceinline__ void signal_peers(const Signals& s, uint32_t epoch) {
  __syncthreads();
  if (threadIdx.x == 0) *s.state = epoch;
  for (int rank = threadIdx.x; rank < s.ranks; rank += blockDim.x) {
    __threadfence_system();
    store_release(flag_of(s, rank, s.rank), epoch);
  }
}

// All threads of one block; what the other ranks stored before they signalled may be read afterwards.
__device__ __forceinline__ void wait_for_peers(const Signals& s, uint32_t epoch) {
  constexpr int kPolls = 256;  // polls between two looks at the clock
  for (int rank = threadIdx.x; rank < s.ranks; rank += blockDim.x) {
    const uint32_t* const flag = flag_of(s, s.rank, rank);
    const int64_t began = nanoseconds();
    for (int polls = 1; int32_t(load_acquire(flag) - epoch) < 0; ++polls) {  // epochs may wrap
      if (polls % kPolls == 0 && nanoseconds() - began > s.timeout_ns) set_error(s, Fault::kTimeout, rank);
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void arrive_and_wait(const Signals& s, int steps, uint32_t epoch) {
  if (steps & kSignal) signal_peers(s, epoch);
  if (steps & kWait) wait_for_peers(s, epoch);
}

}  // namespace moe::cuda
