// Activations of a feed-forward network and their derivatives, in fp32, on pairs of adjacent 16 bit values.
#pragma once

#include <type_traits>

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

namespace ffn {

// ---- two adjacent values in a word ----------------------------------------------------------------------------

template <class Format>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<Format, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
  }
  return pair;
}

template <class Format>
__device__ __forceinline__ void unpack(uint32_t pair, float& first, float& second) {
  using Bits = typename Format::Bits;
  first = Format::to_real(Bits(pair & 0xffff));
  second = Format::to_real(Bits(pair >> 16));
}

// Turns two adjacent values of hidden, one word per part, into their gradients; returns the same two of h. `grads` are the
// gradients of act(hidden) before the combine weight.
template <class Format, class Act, int kParts>
__device__ __forceinline__ uint32_t activation_backward(uint32_t (&parts)[kParts], const float* grads, float weight,
                                                       float& dot) {
  float x[kParts][2], h[2];
#pragma unroll
  for (int part = 0; part < kParts; ++part) unpack<Format>(parts[part], x[part][0], x[part][1]);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float value;
    if constexpr (Act::kGated) value = Act::differentiate(x[0][j], x[1][j]);
    else value = Act::differentiate(x[0][j]);
    dot += grads[j] * value;
    h[j] = weight * value;
#pragma unroll
    for (int part = 0; part < kParts; ++part) x[part][j] *= weight * grads[j];
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) parts[part] = pack<Format>(x[part][0], x[part][1]);
  return pack<Format>(h[0], h[1]);
}

}  // namespace ffn
}  // namespace moe::cuda
