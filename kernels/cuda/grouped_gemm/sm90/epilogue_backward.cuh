// Epilogue of dh = dy down: the gradient through the combine weight and the activation in the same kernel. The tile of
// hidden is the auxiliary input; dhidden is stored from its stages, and the recomputed h with it. The gradient of a combine
// weight is the dot product of dh and act(hidden) along a row: each tile sums its own columns, and a small kernel reduces
// the partial sums in a fixed order.
#pragma once

#include "grouped_gemm/sm90/epilogue.cuh"

namespace moe::cuda::sm90 {

template <class Format, class Act>
class StoreActivationBackward {
 public:
  static constexpr bool kGated = false;  // of the GEMM's own columns
  static constexpr int kParts = Act::kGated ? 2 : 1, kChunks = kTileN / kBox;
  template <int kStagesD>
  using Pipeline = ReuseSmemPipeline<kParts, kStagesD>;
  struct Params {
    CUtensorMap hidden, grad_hidden, h;
    RowWeights combine;
    float* partials;  // (n_tiles, N), or null
    int rows;         // N
    int width;        // F
  };

  __device__ StoreActivationBackward(const Params& p, const WorkTile& tile, int warpgroup)
      : p_(p), coord_(warpgroup, tile), n_(tile.n), weights_(p.combine, coord_) {}
  __device__ bool active() const { return coord_.rows > 0; }

  // Called shortly before the accumulators are ready.
  template <class Pipeline>
  __device__ __forceinline__ void prefetch_aux(const Pipeline& pipeline) const {
    if (pipeline.is_leader()) {
      pipeline.store_wait();
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (column(c) >= p_.width) continue;
        if (c < Pipeline::kStagesC) {
          load(pipeline, c);
        } else {
#pragma unroll
          for (int part = 0; part < kParts; ++part) tma_prefetch(p_.hidden, hidden_coord(c, part));
        }
      }
    }
    __syncwarp();
  }

  template <class Pipeline>
  __device__ __forceinline__ void store(const float (&acc)[kAccRegs], Pipeline& pipeline) const {
    float partials[2] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (column(c) >= p_.width) continue;
      const int buffer = c % Pipeline::kStagesC, next = c - 1 + Pipeline::kStagesC;  // into the buffer before this one
      PackedFragment h;
      pipeline.consume(buffer, [&](int i, uint32_t (&parts)[kParts]) {
        h.words[i] = ffn::activation_backward<Format, Act>(parts, acc + 32 * c + 2 * i,
                                                     i % 2 == 0 ? weights_.low : weights_.high, partials[i % 2]);
      });
      pipeline.commit(
          buffer, h,
          [&] {
            if (c > 0 && next < kChunks && column(next) < p_.width) load(pipeline, next);
          },
          [&](uint32_t smem, uint32_t last) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
              tma_store(p_.grad_hidden, smem + part * kBoxBytes, hidden_coord(c, part));
            }
            tma_store(p_.h, last, hidden_coord(c, 0));
          });
    }
    if (p_.partials != nullptr) store_partials(partials);
  }

 private:
  __device__ int column(int c) const { return n_ * kTileN + c * kBox; }
  __device__ TmaCoord hidden_coord(int c, int part) const { return ragged_coord(column(c), part, coord_.row, coord_.rows); }

  // Four lanes share a row.
  __device__ __forceinline__ void store_partials(float (&partials)[2]) const {
    float* const to = p_.partials + int64_t(n_) * p_.rows + coord_.row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      partials[r] += __shfl_xor_sync(kFullMask, partials[r], 1);
      partials[r] += __shfl_xor_sync(kFullMask, partials[r], 2);
      if (coord_.lane % 4 == 0 && coord_.low + 8 * r < coord_.rows) to[coord_.low + 8 * r] = partials[r];
    }
  }

  template <class Pipeline>
  __device__ __forceinline__ void load(const Pipeline& pipeline, int c) const {
    pipeline.load(c % Pipeline::kStagesC, p_.hidden, [&](int part) { return hidden_coord(c, part); });
  }

  const Params& p_;
  const FragmentCoord coord_;
  const int n_;
  const WeightPair weights_;
};

}  // namespace moe::cuda::sm90
