// Two neighbouring 16 bit values in a word.
#pragma once

#include <type_traits>

#include "grouped_gemm/activation.cuh"

namespace moe::cuda::ffn {

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

// Turns two neighbours of hidden, one word per part, into their gradients; returns the same two of h. `grads` are the
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

}  // namespace moe::cuda::ffn
