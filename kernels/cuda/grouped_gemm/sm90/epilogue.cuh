// Epilogues: accumulators to global memory, as they are or through the activation.
#pragma once

#include "grouped_ffn.h"
#include "grouped_gemm/sm90/epilogue_smem.cuh"

namespace moe::cuda::sm90 {

// The combine weights of this thread's two rows. Loaded before the mainloop, so that they have arrived after it.
struct WeightPair {
  float low = 1.0f, high = 1.0f;

  __device__ WeightPair(const RowWeights& combine, const FragmentCoord& at) {
    if (combine.weights == nullptr) return;
    if (at.low < at.rows) low = combine.weights[combine.slot_of_row[at.row + at.low]];
    if (at.low + 8 < at.rows) high = combine.weights[combine.slot_of_row[at.row + at.low + 8]];
  }
};

// The i-th word of columns 64 c to 64 c + 63 of the tile.
template <class Format>
__device__ __forceinline__ uint32_t pack_acc(const float (&acc)[kAccRegs], int c, int i) {
  return pack<Format>(acc[32 * c + 2 * i], acc[32 * c + 2 * i + 1]);
}

// Rows (N, width) out.
template <class Format>
class StoreRows {
 public:
  template <int kStagesD>
  using Pipeline = TmaStorePipeline<kStagesD>;
  static constexpr bool kGated = false;
  struct Params {
    CUtensorMap out;
    int width;
  };

  __device__ StoreRows(const Params& p, const WorkTile& tile, int warpgroup) : p_(p), coord_(warpgroup, tile), n_(tile.n) {}
  __device__ bool active() const { return coord_.rows > 0; }

  template <class Pipeline>
  __device__ __forceinline__ void store(const float (&acc)[kAccRegs], Pipeline& pipeline) const {
#pragma unroll
    for (int c = 0; c < kTileN / kBox; ++c) {
      const int column = n_ * kTileN + c * kBox;
      if (column >= p_.width) continue;
      pipeline.commit([&](int i) { return pack_acc<Format>(acc, c, i); }, [&](uint32_t smem) {
        tma_store(p_.out, smem, ragged_coord(column, 0, coord_.row, coord_.rows));
      });
    }
  }

 private:
  const Params& p_;
  const FragmentCoord coord_;
  const int n_;
};

// hidden, where it is kept, and h = weight * act(hidden). Gate and up of one column are accumulators of one thread:
// the tile's first 128 columns are gates, the others their ups.
template <class Format, class Act>
class StoreActivation {
 public:
  template <int kStagesD>
  using Pipeline = TmaStorePipeline<kStagesD>;
  static constexpr bool kGated = Act::kGated;
  struct Params {
    CUtensorMap hidden, h;
    RowWeights combine;
    int width;  // F
    bool keeps_hidden;
  };

  __device__ StoreActivation(const Params& p, const WorkTile& tile, int warpgroup)
      : p_(p), coord_(warpgroup, tile), n_(tile.n), weights_(p.combine, coord_) {}
  __device__ bool active() const { return coord_.rows > 0; }

  template <class Pipeline>
  __device__ __forceinline__ void store(const float (&acc)[kAccRegs], Pipeline& pipeline) const {
    constexpr int kChunks = kTileN / kBox / (kGated ? 2 : 1);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = (n_ * kChunks + c) * kBox;
      if (column >= p_.width) continue;
      if (p_.keeps_hidden) {
#pragma unroll
        for (int part = 0; part < (kGated ? 2 : 1); ++part) {
          pipeline.commit([&](int i) { return pack_acc<Format>(acc, c + part * kChunks, i); }, [&](uint32_t smem) {
            tma_store(p_.hidden, smem, ragged_coord(column, part, coord_.row, coord_.rows));
          });
        }
      }
      const auto h = [&](int i) {
        const float weight = i % 2 == 0 ? weights_.low : weights_.high;
        float values[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float first = acc[32 * c + 2 * i + j];
          if constexpr (kGated) values[j] = weight * Act::value(first, acc[32 * (c + kChunks) + 2 * i + j]);
          else values[j] = weight * Act::value(first);
        }
        return pack<Format>(values[0], values[1]);
      };
      pipeline.commit(h, [&](uint32_t smem) { tma_store(p_.h, smem, ragged_coord(column, 0, coord_.row, coord_.rows)); });
    }
  }

 private:
  const Params& p_;
  const FragmentCoord coord_;
  const int n_;
  const WeightPair weights_;
};

// The gradient of one expert's weight, (outputs, inputs), in the format or in fp32, where it may be added to another.
template <class Format, bool kFp32>
class StoreWeightGrad {
 public:
  template <int kStagesD>
  using Pipeline = TmaStorePipeline<kStagesD>;
  static constexpr bool kGated = false;
  struct Params {
    CUtensorMap out;
    int outputs, inputs;
    bool accumulate;
  };

  __device__ StoreWeightGrad(const Params& p, const WorkTile& tile, int warpgroup)
      : p_(p), output_(tile.top + warpgroup * kBox), n_(tile.n), expert_(tile.expert) {}
  __device__ bool active() const { return output_ < p_.outputs; }

  template <class Pipeline>
  __device__ __forceinline__ void store(const float (&acc)[kAccRegs], Pipeline& pipeline) const {
#pragma unroll
    for (int c = 0; c < kTileN / kBox; ++c) {
      const int input = n_ * kTileN + c * kBox;
      if (input >= p_.inputs) continue;
      if constexpr (kFp32) {
        store_fp32<0>(acc + 32 * c, input, pipeline);
        if (input + kBox / 2 < p_.inputs) store_fp32<1>(acc + 32 * c, input + kBox / 2, pipeline);
      } else {
        pipeline.commit([&](int i) { return pack_acc<Format>(acc, c, i); }, [&](uint32_t smem) {
          tma_store(p_.out, smem, weight_coord(input, output_, 0, expert_));
        });
      }
    }
  }

 private:
  // One half of 64 columns, which begins at `input`.
  template <int kHalf, class Pipeline>
  __device__ __forceinline__ void store_fp32(const float* acc, int input, Pipeline& pipeline) const {
    const auto pair = [&](int j, int r) {
      const float* const values = acc + 4 * (4 * kHalf + j) + 2 * r;
      return float2{values[0], values[1]};
    };
    pipeline.commit_fp32(pair, [&](uint32_t smem) {
      const TmaCoord at = weight_coord(input, output_, 0, expert_);
      if (p_.accumulate) tma_add(p_.out, smem, at);
      else tma_store(p_.out, smem, at);
    });
  }

  const Params& p_;
  const int output_, n_, expert_;
};

}  // namespace moe::cuda::sm90
