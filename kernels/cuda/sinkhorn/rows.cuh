// Rows of the sinkhorn kernel: from memory to a sub-warp of kLanes lanes, kPerLane columns each, and back.
#pragma once

#include <cfloat>

#include "common/fast_math.cuh"
#include "common/subwarp.cuh"
#include "sinkhorn.h"

namespace moe::cuda::sinkhorn_detail {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

struct SinkhornLaunch : SinkhornParams {
  float sharpness;  // 1 / temperature, to the base 2
  int rows;         // of a sub-warp, when they are kept
};

// fp16 or bf16, asked for at each logit: half as many of the large kernels to compile, where they load each logit once.
struct AnyFp16 {
  using Bits = int16_t;
  static __device__ float to_real(const SinkhornLaunch& p, Bits bits) {
    return p.dtype == DType::kFp16 ? Fp16::to_real(bits) : Bf16::to_real(bits);
  }
  static __device__ int inf(const SinkhornLaunch& p) { return p.dtype == DType::kFp16 ? Fp16::kInf : Bf16::kInf; }
};

template <class Format>
struct Decoder {
  static __device__ float to_real(const SinkhornLaunch&, typename Format::Bits bits) { return Format::to_real(bits); }
  static __device__ int inf(const SinkhornLaunch&) { return Format::kInf; }
};
template <>
struct Decoder<AnyFp16> : AnyFp16 {};

// Chunks of kChunk columns alternate between the lanes of a sub-warp, so that they move whole sectors of memory.
constexpr int kChunk = 4;

template <int kLanes>
__device__ int column_of(int v) {
  return (v / kChunk * kLanes + threadIdx.x % kLanes) * kChunk + v % kChunk;  // increases with v
}

// A lane's logits of a row as they are in memory; -inf from column E on.
template <class Format, int kLanes, int kPerLane>
struct RawLogits {
  using Bits = typename Format::Bits;
  static constexpr int kPerWord = int(4 / sizeof(Bits));
  struct alignas(kChunk * sizeof(Bits)) Chunk {
    uint32_t words[kChunk / kPerWord];
  };
  Chunk chunks[kPerLane / kChunk];

  template <bool kAligned>
  __device__ void load(const SinkhornLaunch& p, int64_t t) {
    const Bits* const from = static_cast<const Bits*>(p.logits) + t * p.row_stride;
    const uint32_t bits = uint32_t(Decoder<Format>::inf(p)) | 1u << (8 * sizeof(Bits) - 1);
    const uint32_t minus_inf = kPerWord == 1 ? bits : bits * 0x10001u;
#pragma unroll
    for (int c = 0; c < kPerLane / kChunk; ++c) {
      const int column = column_of<kLanes>(c * kChunk);
#pragma unroll
      for (int w = 0; w < kChunk / kPerWord; ++w) chunks[c].words[w] = minus_inf;
      if constexpr (kAligned) {
        if (column < p.experts) chunks[c] = *reinterpret_cast<const Chunk*>(from + column);
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (column + i >= p.experts) continue;
          const uint32_t bits = uint32_t(from[column + i]);
          uint32_t& word = chunks[c].words[i / kPerWord];
          if (kPerWord == 1) word = bits;
          else word = __byte_perm(word, bits, i % 2 == 0 ? 0x3254 : 0x5410);
        }
      }
    }
  }
  __device__ float at(const SinkhornLaunch& p, int v) const {
    return Decoder<Format>::to_real(p, Bits(chunks[v / kChunk].words[v % kChunk / kPerWord] >> (v % kPerWord * 16)));
  }
};

// A lane's columns of a row in shared memory.
template <int kLanes, int kPerLane>
__device__ __forceinline__ void read_columns(const float* from, float (&to)[kPerLane]) {
#pragma unroll
  for (int v = 0; v < kPerLane; v += kChunk) {
    const float4 four = *reinterpret_cast<const float4*>(from + column_of<kLanes>(v));
    to[v] = four.x, to[v + 1] = four.y, to[v + 2] = four.z, to[v + 3] = four.w;
  }
}

template <int kLanes, bool kAligned, int kPerLane>
__device__ void write_row(const SinkhornLaunch& p, int64_t t, const float (&values)[kPerLane]) {
  float* const to = p.scores + t * p.experts;
#pragma unroll
  for (int v = 0; v < kPerLane; v += kChunk) {
    const int column = column_of<kLanes>(v);
    if constexpr (kAligned) {
      const float4 four = make_float4(values[v], values[v + 1], values[v + 2], values[v + 3]);
      if (column < p.experts) *reinterpret_cast<float4*>(to + column) = four;
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (column + i < p.experts) to[column + i] = values[v + i];
      }
    }
  }
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// Exponentials are 2 to this power too large, so that they reach below what fp32 can hold of them: what underflows here
// would underflow in a softmax.
constexpr float kLift = 32;

// What is taken off the logits of kCount rows, side by side for their latencies to overlap, so that exp2 of
// z = (logit - largest) * sharpness + potential - top neither overflows nor all underflows.
template <int kLanes, int kPerLane, int kCount>
struct RowOffsets {
  float largest[kCount];  // NaN in a row that takes no part (outside, or with a NaN or +inf); +inf if all are -inf
  float top[kCount];      // 0 unless the potentials are large: `shifted`

  template <class Raw, class Inside>
  __device__ void find(const SinkhornLaunch& p, const Raw* raw, const Inside& inside,
                       const float (&potential)[kPerLane], bool shifted) {
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      largest[r] = -INFINITY;
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) largest[r] = max_or_nan(largest[r], raw[r].at(p, v));
    }
    subwarp_reduce_each<kLanes>(largest, max_or_nan);
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      if (!(inside(r) && largest[r] < INFINITY)) largest[r] = NAN;
      if (largest[r] == -INFINITY) largest[r] = INFINITY;
      top[r] = 0;
    }
    if (!shifted) return;
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      top[r] = -INFINITY;
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) top[r] = fmaxf(top[r], z(p, raw[r], r, v, p.sharpness, potential));
    }
    subwarp_reduce_each<kLanes>(top, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int r = 0; r < kCount; ++r) top[r] = top[r] == -INFINITY ? 0 : top[r];
  }

  // Before top is taken off. Subtracts first: the temperature may be small enough for a plain division to overflow.
  template <class Raw>
  __device__ float z(const SinkhornLaunch& p, const Raw& raw, int r, int v, float sharpness,
                     const float (&potential)[kPerLane]) const {
    return (raw.at(p, v) - largest[r]) * sharpness + potential[v];
  }

  // exp2(z + kLift), or zeros in rows that take no part; returns how many do.
  template <class Raw>
  __device__ int exponentials(const SinkhornLaunch& p, const Raw* raw, const float (&potential)[kPerLane], bool shifted,
                              float (*values)[kPerLane]) const {
    int live = 0;
    bool any_out = false;
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const float lift = kLift - (shifted ? top[r] : 0);
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) values[r][v] = exp2_of(z(p, raw[r], r, v, p.sharpness, potential) + lift);
      live += largest[r] < INFINITY;
      any_out |= isnan(largest[r]);
    }
    if (__any_sync(kFullMask, any_out)) {
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
#pragma unroll
        for (int v = 0; v < kPerLane; ++v) values[r][v] = isnan(largest[r]) ? 0 : values[r][v];
      }
    }
    return live;
  }
};

// What a row is to be multiplied by to sum to 1 with these factors of the columns; finite for a row without mass.
template <int kLanes, int kPerLane, int kCount>
__device__ void scales_of(const float (&rows)[kCount][kPerLane], const float (&factors)[kPerLane],
                          float (&scales)[kCount]) {
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
    scales[r] = 0;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) scales[r] += rows[r][v] * factors[v];
  }
  subwarp_sum_each<kLanes>(scales);
#pragma unroll
  for (int r = 0; r < kCount; ++r) scales[r] = reciprocal(scales[r]);
}

// Sums over the sub-warps of a warp. Halves of the columns are exchanged until each lane holds its own columns: the first
// `held` of x, which were those from the returned one on.
template <int kLanes, int kPerLane>
__device__ int sum_over_subwarps(float (&x)[kPerLane], int& held) {
  int first = 0, n = kPerLane;
#pragma unroll
  for (int step = kWarp / 2; step >= kLanes; step /= 2) {
    if (n > 1) {
      n /= 2;
      const bool upper = threadIdx.x & step;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i < n) {
          const float given = upper ? x[i] : x[i + n];
          const float kept = upper ? x[i + n] : x[i];
          x[i] = kept + __shfl_xor_sync(kFullMask, given, step);
        }
      }
      first += upper ? n : 0;
    } else {
      x[0] += __shfl_xor_sync(kFullMask, x[0], step);
    }
  }
  held = n;
  return first;
}

}  // namespace moe::cuda::sinkhorn_detail
