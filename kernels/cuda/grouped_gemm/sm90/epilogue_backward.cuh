// The gradient of the hidden rows: dh = dy down, and inclusive the combine weight and the activation in the same kernel.
// A tile's part of hidden comes in beside it; dhidden goes out in its stage, and h, made anew, with it. The gradient of
// a combine weight is the dot product of dh and act(hidden) along a row: a tile sums its own columns, and a small
// kernel adds the tiles up, in one order.
#pragma once

#include "grouped_gemm/sm90/epilogue.cuh"

namespace moe::cuda::sm90 {

template <class Format, class Act>
class DownBackwardOut {
 public:
  static constexpr bool kGated = false;  // of the product: one kind of columns
  static constexpr int kParts = Act::kGated ? 2 : 1, kChunks = kTileN / kBox;
  template <int kSlots>
  using Exchange = InPlace<kParts, kSlots>;
  struct Params {
    CUtensorMap hidden, grad_hidden, h;
    RowWeights combine;
    float* dots;  // (n_tiles, N), or null
    int rows;     // N
    int width;    // F
  };

  __device__ DownBackwardOut(const Params& p, const WorkTile& tile, int group)
      : p_(p), at_(group, tile), n_(tile.n), weights_(p.combine, at_) {}
  __device__ bool active() const { return at_.rows > 0; }

  // Shortly before the sums are ready.
  template <class Exchange>
  __device__ __forceinline__ void ask(const Exchange& exchange) const {
    if (exchange.leads()) {
      exchange.wait_until_sent();
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (column(c) >= p_.width) continue;
        if (c < Exchange::kLoads) {
          load(exchange, c);
        } else {
#pragma unroll
          for (int part = 0; part < kParts; ++part) tma_prefetch(p_.hidden, hidden_coord(c, part));
        }
      }
    }
    __syncwarp();
  }

  template <class Exchange>
  __device__ __forceinline__ void store(const float (&sums)[kSums], Exchange& exchange) const {
    float dots[2] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (column(c) >= p_.width) continue;
      const int buffer = c % Exchange::kLoads, next = c - 1 + Exchange::kLoads;  // into the buffer before this one
      Chunk h;
      exchange.receive(buffer, [&](int i, uint32_t (&parts)[kParts]) {
        h.words[i] = ffn::through_activation<Format, Act>(parts, sums + 32 * c + 2 * i,
                                                     i % 2 == 0 ? weights_.low : weights_.high, dots[i % 2]);
      });
      exchange.send(
          buffer, h,
          [&] {
            if (c > 0 && next < kChunks && column(next) < p_.width) load(exchange, next);
          },
          [&](uint32_t slots, uint32_t last) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
              tma_store(p_.grad_hidden, slots + part * kBoxBytes, hidden_coord(c, part));
            }
            tma_store(p_.h, last, hidden_coord(c, 0));
          });
    }
    if (p_.dots != nullptr) store_dots(dots);
  }

 private:
  __device__ int column(int c) const { return n_ * kTileN + c * kBox; }
  __device__ TmaCoord hidden_coord(int c, int part) const { return ragged_coord(column(c), part, at_.row, at_.rows); }

  // Four lanes share a row.
  __device__ __forceinline__ void store_dots(float (&dots)[2]) const {
    float* const to = p_.dots + int64_t(n_) * p_.rows + at_.row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      dots[r] += __shfl_xor_sync(kFullMask, dots[r], 1);
      dots[r] += __shfl_xor_sync(kFullMask, dots[r], 2);
      if (at_.lane % 4 == 0 && at_.low + 8 * r < at_.rows) to[at_.low + 8 * r] = dots[r];
    }
  }

  template <class Exchange>
  __device__ __forceinline__ void load(const Exchange& exchange, int c) const {
    exchange.load(c % Exchange::kLoads, p_.hidden, [&](int part) { return hidden_coord(c, part); });
  }

  const Params& p_;
  const Place at_;
  const int n_;
  const WeightPair weights_;
};

}  // namespace moe::cuda::sm90
