// Small things every launcher and kernel here needs.
#pragma once

#include <cuda_runtime.h>

#include "dtype.h"
#include "status.h"

namespace moe::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }

// The launch's own error, taken off the runtime so that the next call does not see it.
inline Status launched() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {Code::kCuda, int(error)};
}

template <class T>
MOE_HD T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Sum of the values of lower lanes; `total` becomes the sum over the warp.
__device__ __forceinline__ int32_t warp_exclusive_sum(int32_t value, int32_t& total) {
  const int lane = threadIdx.x % kWarp;
  int32_t inclusive = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t lower = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += lower;
  }
  total = __shfl_sync(kAllLanes, inclusive, kWarp - 1);
  return inclusive - value;
}

}  // namespace moe::cuda
