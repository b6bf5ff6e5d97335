// Reductions over a sub-warp of kLanes adjacent lanes; every lane has the result. All lanes of the warp must call.
// Sums have a fixed order: the same bits on every run.
#pragma once

#include <type_traits>

#include "common/launch.cuh"

namespace moe::cuda {

template <int kLanes, class T, class Combine>
__device__ __forceinline__ T subwarp_reduce(T value, const Combine& combine) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(kFullMask, value, step));
  }
  return value;
}

// Several at once, one step of all before the next step of any, which overlaps the latencies of the shuffles.
template <int kLanes, class T, int kCount, class Combine>
__device__ __forceinline__ void subwarp_reduce_each(T (&values)[kCount], const Combine& combine) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    T others[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) others[i] = __shfl_xor_sync(kFullMask, values[i], step);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = combine(values[i], others[i]);
  }
}

template <int kLanes, class T>
__device__ __forceinline__ T subwarp_sum(T value) {
  return subwarp_reduce<kLanes>(value, [](T a, T b) { return a + b; });
}

template <int kLanes, class T, int kCount>
__device__ __forceinline__ void subwarp_sum_each(T (&values)[kCount]) {
  subwarp_reduce_each<kLanes>(values, [](T a, T b) { return a + b; });
}

template <int kLanes, class T>
__device__ __forceinline__ T subwarp_max(T value) {
  if constexpr (kLanes == kWarp && std::is_integral_v<T> && sizeof(T) == 4) {
    return __reduce_max_sync(kFullMask, value);
  } else {
    return subwarp_reduce<kLanes>(value, [](T a, T b) { return a > b ? a : b; });
  }
}

template <int kLanes>
__device__ __forceinline__ int subwarp_min(int value) {
  if constexpr (kLanes == kWarp) {
    return __reduce_min_sync(kFullMask, value);
  } else {
    return subwarp_reduce<kLanes>(value, [](int a, int b) { return min(a, b); });
  }
}

// Sum of the values of lower lanes; `total` becomes the sum over the warp.
__device__ __forceinline__ int32_t warp_exclusive_sum(int32_t value, int32_t& total) {
  const int lane = threadIdx.x % kWarp;
  int32_t inclusive = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t lower = __shfl_up_sync(kFullMask, inclusive, step);
    if (lane >= step) inclusive += lower;
  }
  total = __shfl_sync(kFullMask, inclusive, kWarp - 1);
  return inclusive - value;
}

}  // namespace moe::cuda
