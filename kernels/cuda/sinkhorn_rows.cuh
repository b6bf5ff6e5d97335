// Rows of the sinkhorn kernel: from memory to a group of kLanes lanes, kPerLane columns each, and back.
#pragma once

#include <cfloat>

#include "approximate.cuh"
#include "groups.cuh"
#include "sinkhorn.h"

namespace moe::cuda::sinkhorn_detail {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

struct SinkhornLaunch : SinkhornParams {
  float sharpness;  // 1 / temperature
  int rows;         // of a group, when they are kept
  bool aligned;     // logits and scores may be moved kChunk at once
};

// Lanes of a group take turns with chunks of kChunk neighbouring columns, so that they move whole sectors of memory.
constexpr int kChunk = 4;

template <int kLanes>
__device__ int column_of(int v) {
  return (v / kChunk * kLanes + threadIdx.x % kLanes) * kChunk + v % kChunk;  // rises with v
}

// A lane's logits of a row as they are in memory; -inf from column E on.
template <class Format, int kLanes, int kPerLane>
struct RawLogits {
  using Bits = typename Format::Bits;
  static constexpr int kPerWord = int(4 / sizeof(Bits));
  static constexpr uint32_t kMinusInf = uint32_t(uint32_t(Format::kInf) | 1u << (8 * sizeof(Bits) - 1));
  struct alignas(kChunk * sizeof(Bits)) Chunk {
    uint32_t words[kChunk / kPerWord];
  };
  Chunk chunks[kPerLane / kChunk];

  template <bool kAligned>
  __device__ void load(const SinkhornLaunch& p, int64_t t) {
    const Bits* const from = static_cast<const Bits*>(p.logits) + t * p.row_stride;
#pragma unroll
    for (int c = 0; c < kPerLane / kChunk; ++c) {
      const int column = column_of<kLanes>(c * kChunk);
#pragma unroll
      for (int w = 0; w < kChunk / kPerWord; ++w) chunks[c].words[w] = kPerWord == 1 ? kMinusInf : kMinusInf * 0x10001u;
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
  __device__ float at(int v) const {
    return float(Format::to_real(Bits(chunks[v / kChunk].words[v % kChunk / kPerWord] >> (v % kPerWord * 16))));
  }
};

// A lane's share of a row of columns in shared memory.
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

// kCount rows in a group's registers, side by side for their latencies to overlap: log scores with the potentials
// added, less a number of the row's own that lets exp(z) neither overflow nor all underflow.
template <class Format, int kLanes, int kPerLane, int kCount>
struct Rows {
  float z[kCount][kPerLane];
  bool broken[kCount], empty[kCount];  // holds a NaN or +inf; holds nothing but -inf

  // `shifted`: the potentials are so large that the row's maximum must be looked for again.
  __device__ void set(const RawLogits<Format, kLanes, kPerLane>* raw, float sharpness,
                      const float (&potential)[kPerLane], bool shifted) {
    const unsigned group = (kLanes == kWarp ? kAllLanes : (1u << (kLanes % kWarp)) - 1)
                           << (threadIdx.x % kWarp / kLanes * kLanes);
    const auto larger = [](float a, float b) { return fmaxf(a, b); };
    float largest[kCount];
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      largest[r] = -INFINITY;
      bool strange = false;
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        z[r][v] = raw[r].at(v);
        strange |= !(z[r][v] < INFINITY);
        largest[r] = fmaxf(largest[r], z[r][v]);
      }
      broken[r] = __ballot_sync(kAllLanes, strange) & group;
    }
    group_reduce_each<kLanes>(largest, larger);
    float top[kCount];
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      empty[r] = !broken[r] && largest[r] == -INFINITY;
      if (empty[r] || broken[r]) largest[r] = 0;
      top[r] = -INFINITY;
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        // Subtract first: the temperature may be small enough for a plain division to overflow.
        z[r][v] = (z[r][v] - largest[r]) * sharpness + potential[v];
        top[r] = fmaxf(top[r], z[r][v]);
      }
    }
    if (!shifted) return;
    group_reduce_each<kLanes>(top, larger);
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      if (top[r] == -INFINITY) top[r] = 0;
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) z[r][v] -= top[r];
    }
  }

  // exp(z), or zeros if the row takes no part; whether it does.
  __device__ bool exponentials(int r, bool inside, float (&values)[kPerLane]) const {
    const bool live = inside && !broken[r] && !empty[r];
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) values[v] = live ? exp_of(z[r][v]) : 0.0f;
    return live;
  }
};

// What a row is to be divided by to sum to 1 with these factors of the columns; 0 for a row without mass.
template <int kLanes, int kPerLane, int kCount>
__device__ void scales_of(const float (&rows)[kCount][kPerLane], const float (&factors)[kPerLane],
                          float (&scales)[kCount]) {
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
    scales[r] = 0;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) scales[r] += rows[r][v] * factors[v];
  }
  group_sum_each<kLanes>(scales);
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
    scales[r] = scales[r] > 0 ? reciprocal(scales[r]) : 0.0f;
  }
}

// Adds up over the groups of a warp. Halves of the columns are exchanged until each lane holds its own share, the
// first `held` of x, which were those from the returned one on.
template <int kLanes, int kPerLane>
__device__ int sum_over_groups(float (&x)[kPerLane], int& held) {
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
          x[i] = kept + __shfl_xor_sync(kAllLanes, given, step);
        }
      }
      first += upper ? n : 0;
    } else {
      x[0] += __shfl_xor_sync(kAllLanes, x[0], step);
    }
  }
  held = n;
  return first;
}

}  // namespace moe::cuda::sinkhorn_detail
