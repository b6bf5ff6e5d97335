// Activations of a feed-forward network and their derivatives, in fp32.
#pragma once

#include "common/fast_math.cuh"

namespace moe::cuda {

__device__ __forceinline__ float sigmoid(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + exp_of(-x)));  // of +inf: 0
  return y;
}

// silu(gate) * up
struct Swiglu {
  static constexpr bool kGated = true;
  static __device__ __forceinline__ float value(float gate, float up) { return gate * sigmoid(gate) * up; }

  // Returns the value; turns gate and up into the derivatives by them.
  static __device__ __forceinline__ float differentiate(float& gate, float& up) {
    const float s = sigmoid(gate), silu = gate * s, u = up;
    gate = u * (s + silu * (1.0f - s));
    up = silu;
    return silu * u;
  }
};

// x Phi(x), with the error function itself
struct Gelu {
  static constexpr bool kGated = false;
  static constexpr float kSqrtHalf = 0.7071067811865476f, kInvSqrtTwoPi = 0.3989422804014327f;
  static __device__ __forceinline__ float phi(float x) { return 0.5f + 0.5f * erff(x * kSqrtHalf); }
  static __device__ __forceinline__ float value(float x) { return x * phi(x); }

  static __device__ __forceinline__ float differentiate(float& x) {
    const float p = phi(x), value = x * p;
    x = p + x * kInvSqrtTwoPi * exp_of(-0.5f * x * x);
    return value;
  }
};

}  // namespace moe::cuda
