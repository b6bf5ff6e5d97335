// Fast arithmetic for combine weights and scores, where the instruction's own rounding is far below the tolerance.
#pragma once

#include <limits>

#include "common/launch.cuh"

namespace moe::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Of differences to a maximum: off by 1e-7 at most.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exp_of(float x) { return exp2_of(x * kLog2E); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

// Of a sum of weights; a sum of nothing but zeros stays harmless.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaxf(x, std::numeric_limits<float>::min())));
  return y;
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / fmax(x, std::numeric_limits<double>::min()); }

}  // namespace moe::cuda
