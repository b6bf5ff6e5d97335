// Epilogues of a warp's 64 x 64 accumulators: stored as they are, through the activation, or backward through it.
#pragma once

#include "grouped_ffn.h"
#include "grouped_gemm/activation.cuh"
#include "grouped_gemm/sm80/mma.cuh"
#include "grouped_gemm/tile_scheduler.cuh"

namespace moe::cuda::sm80 {

using ffn::WorkTile;
using Accumulators = float[4][8][4];  // of a thread: 16 rows, 8 columns, and its four of these

constexpr int kRowsOfThread = 8;  // eight rows apart

// Row i of this thread: eight columns, from `part` 32 columns on. The instruction leaves a lane two adjacent values in
// each eight columns. Four lanes share a row: they exchange, so that each has all of another eight, 16 bytes of memory.
__device__ __forceinline__ void gather_fragment(const Accumulators& acc, int i, int part, float (&fragment)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) fragment[j] = acc[i / 2][4 * part + j / 2][i % 2 * 2 + j % 2];
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j / 2 & bit) continue;
      float &low = fragment[j], &high = fragment[j + 2 * bit];
      const float other = __shfl_xor_sync(kFullMask, upper ? low : high, bit);
      if (upper) low = other;
      else high = other;
    }
  }
}

template <class Format>
__device__ __forceinline__ void store_fragment(uint16_t* to, const float (&fragment)[8]) {
  uint4 words;
  words.x = ffn::pack<Format>(fragment[0], fragment[1]);
  words.y = ffn::pack<Format>(fragment[2], fragment[3]);
  words.z = ffn::pack<Format>(fragment[4], fragment[5]);
  words.w = ffn::pack<Format>(fragment[6], fragment[7]);
  *reinterpret_cast<uint4*>(to) = words;
}

// Output coordinates of a thread.
struct OutputCoord {
  int64_t row;  // the thread's first, and its first column
  int column;
  int rows_left, columns_left;  // from there on
  int width;                    // of a row

  __device__ bool has_row(int i) const { return 8 * i < rows_left; }
  __device__ bool has(int i, int c) const { return has_row(i) && 32 * c < columns_left; }

  // The thread's first element in rows of `parts` times the width, and from one of its rows to the next.
  __device__ int64_t start(int parts) const { return row * parts * width + column; }
  __device__ int64_t step(int parts) const { return int64_t(8) * parts * width; }
};

// The combine weights of a thread's rows. Four lanes share their rows: each keeps the weights of two.
class WeightsOfRows {
 public:
  __device__ __forceinline__ WeightsOfRows(const RowWeights& combine, const OutputCoord& at) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int i = 4 * j + threadIdx.x % 4;
      kept_[j] = 1.0f;
      if (combine.weights == nullptr || !at.has_row(i)) continue;
      kept_[j] = combine.weights[combine.slot_of_row[at.row + 8 * i]];
    }
  }

  __device__ __forceinline__ float of(int i) const {  // all lanes of the warp
    return __shfl_sync(kFullMask, kept_[i / 4], threadIdx.x / 4 * 4 + i % 4);
  }

 private:
  float kept_[2];
};

// Epilogues take a thread's rows in order, next_row() after each: store(i, c, fragments) has eight columns of row i, from
// 32 c columns on; gates and ups of a gated one. Addresses advance with the rows: holding all
// of them would take more registers than there are.

// Rows (N, width) out, or those of a weight's gradient.
template <class Format>
class StoreRows {
 public:
  static constexpr bool kGated = false;
  struct Params {
    uint16_t* out;
  };

  __device__ StoreRows(const Params& p, const OutputCoord& at) : coord_(at), out_(p.out + at.start(1)) {}

  __device__ __forceinline__ void store(int i, int c, const float (&fragments)[1][8]) const {
    if (coord_.has(i, c)) store_fragment<Format>(out_ + 32 * c, fragments[0]);
  }
  __device__ void next_row() { out_ += coord_.step(1); }

 private:
  const OutputCoord coord_;
  uint16_t* out_;
};

// Those of a weight's gradient in fp32, which may be added to another.
class StoreFp32 {
 public:
  static constexpr bool kGated = false;
  struct Params {
    float* out;
    bool accumulate;
  };

  __device__ StoreFp32(const Params& p, const OutputCoord& at)
      : coord_(at), accumulates_(p.accumulate), out_(p.out + at.start(1)) {}

  __device__ __forceinline__ void store(int i, int c, const float (&fragments)[1][8]) const {
    if (!coord_.has(i, c)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* const values = fragments[0] + 4 * half;
      float4* const to = reinterpret_cast<float4*>(out_ + 32 * c) + half;
      const float4 before = accumulates_ ? *to : float4{};
      *to = {before.x + values[0], before.y + values[1], before.z + values[2], before.w + values[3]};
    }
  }
  __device__ void next_row() { out_ += coord_.step(1); }

 private:
  const OutputCoord coord_;
  const bool accumulates_;
  float* out_;
};

// hidden, where it is kept, and h = weight * act(hidden).
template <class Format, class Act>
class StoreActivation {
 public:
  static constexpr bool kGated = Act::kGated;
  static constexpr int kParts = kGated ? 2 : 1;
  struct Params {
    uint16_t *hidden, *h;
    RowWeights combine;
  };

  __device__ StoreActivation(const Params& p, const OutputCoord& at)
      : coord_(at), weights_(p.combine, at), keeps_hidden_(p.hidden != nullptr), h_(p.h + at.start(1)),
        hidden_(p.hidden + at.start(kParts)) {}

  __device__ __forceinline__ void store(int i, int c, const float (&fragments)[kParts][8]) const {
    const float weight = weights_.of(i);
    if (!coord_.has(i, c)) return;
    if (keeps_hidden_) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        store_fragment<Format>(hidden_ + part * coord_.width + 32 * c, fragments[part]);
      }
    }
    float h[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if constexpr (kGated) h[j] = weight * Act::value(fragments[0][j], fragments[1][j]);
      else h[j] = weight * Act::value(fragments[0][j]);
    }
    store_fragment<Format>(h_ + 32 * c, h);
  }
  __device__ void next_row() {
    h_ += coord_.step(1);
    hidden_ += coord_.step(kParts);
  }

 private:
  const OutputCoord coord_;
  const WeightsOfRows weights_;
  const bool keeps_hidden_;
  uint16_t *h_, *hidden_;
};

// The accumulators are gradients of act(hidden). Stores those of hidden, the recomputed h, and per row the dot product
// with act(hidden) over the warp's 64 columns.
template <class Format, class Act>
class StoreActivationBackward {
 public:
  static constexpr bool kGated = false;  // of the GEMM's own columns
  static constexpr int kParts = Act::kGated ? 2 : 1;
  struct Params {
    const uint16_t* hidden;
    uint16_t *grad_hidden, *h;
    RowWeights combine;
    float* partials;  // (ceil(F / 64), N), or null
    int rows;         // N
  };

  __device__ StoreActivationBackward(const Params& p, const OutputCoord& at)
      : p_(p), coord_(at), weights_(p.combine, at), h_(at.start(1)), hidden_(at.start(kParts)),
        partials_(p.partials == nullptr ? nullptr : p.partials + int64_t(at.column / kWarpTile) * p.rows + at.row) {
    prefetch(0, 0, hidden_);
  }

  __device__ __forceinline__ void store(int i, int c, const float (&fragments)[1][8]) {
    if (c == 0) prefetch(i, 1, hidden_);  // a fragment ahead
    else if (i + 1 < kRowsOfThread) prefetch(i + 1, 0, hidden_ + coord_.step(kParts));
    if (c == 0) dot_ = 0.0f;
    const float weight = weights_.of(i);
    if (coord_.has(i, c)) store_gradients(c, weight, fragments[0]);
    if (c == 0 || partials_ == nullptr) return;
    dot_ += __shfl_xor_sync(kFullMask, dot_, 1);  // four lanes share a row
    dot_ += __shfl_xor_sync(kFullMask, dot_, 2);
    if (threadIdx.x % 4 == 0 && coord_.has_row(i)) partials_[8 * i] = dot_;
  }
  __device__ void next_row() {
    h_ += coord_.step(1);
    hidden_ += coord_.step(kParts);
  }

 private:
  __device__ __forceinline__ void prefetch(int i, int c, int64_t row) {
    if (!coord_.has(i, c)) return;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      prefetched_[c][part] = *reinterpret_cast<const uint4*>(p_.hidden + row + part * coord_.width + 32 * c);
    }
  }

  __device__ __forceinline__ void store_gradients(int c, float weight, const float (&grads)[8]) {
    uint32_t words[4][kParts], h[4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint4& w = prefetched_[c][part];
      words[0][part] = w.x, words[1][part] = w.y, words[2][part] = w.z, words[3][part] = w.w;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      h[j] = ffn::activation_backward<Format, Act>(words[j], grads + 2 * j, weight, dot_);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      *reinterpret_cast<uint4*>(p_.grad_hidden + hidden_ + part * coord_.width + 32 * c) =
          make_uint4(words[0][part], words[1][part], words[2][part], words[3][part]);
    }
    *reinterpret_cast<uint4*>(p_.h + h_ + 32 * c) = make_uint4(h[0], h[1], h[2], h[3]);
  }

  const Params& p_;
  const OutputCoord coord_;
  const WeightsOfRows weights_;
  int64_t h_, hidden_;  // where the current row is
  float* const partials_;
  uint4 prefetched_[2][kParts];
  float dot_;
};

}  // namespace moe::cuda::sm80
