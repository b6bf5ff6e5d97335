// What the kernels of select share: a launch, a row in registers, and the counts of a block.
#pragma once

#include "common/fast_math.cuh"
#include "common/block_counters.cuh"
#include "select/sortable_keys.cuh"
#include "select.h"

namespace moe::cuda {

constexpr int kMinWarps = 8;  // of a block

// Per block, by registers. At most one block per multiprocessor: every block adds to every count, and atomics to one
// address serialise.
constexpr int max_warps(int per_lane) { return per_lane > 16 ? 16 : 32; }

static __device__ LastBlockCounter<kMaxExperts + 1> counters;
constexpr int kInvalid = kMaxExperts;  // its counter

struct SelectLaunch : SelectParams {
  int counter_slot;
  bool aligned;  // chunks of logits may be loaded at once
  float scale;   // scaling_factor, which is fp64

  template <class Real>
  __device__ Real scaling() const {
    if constexpr (sizeof(Real) == 8) return scaling_factor;
    else return scale;
  }
};

// What the plain kernels read, under the same names: a launch takes the longer, the more arguments it has.
struct PlainLaunch {
  const void* logits;
  int64_t row_stride;
  void* weights;
  int32_t* expert_ids;
  int32_t* tokens_per_expert;
  int32_t* invalid_rows;
  int tokens, experts, top_k;
  int counter_slot;
  bool aligned;

  explicit PlainLaunch(const SelectLaunch& p)
      : logits(p.logits),
        row_stride(p.row_stride),
        weights(p.weights),
        expert_ids(p.expert_ids),
        tokens_per_expert(p.tokens_per_expert),
        invalid_rows(p.invalid_rows),
        tokens(int(p.tokens)),
        experts(p.experts),
        top_k(p.top_k),
        counter_slot(p.counter_slot),
        aligned(p.aligned) {}
};

// A lane's fragment of a row, as it is in memory; beyond the experts anything, or zeros (kZeros).
template <class Format, int kLanes, int kPerLane, class LayoutFormat = Format>
struct RowFragment {
  using Bits = typename Format::Bits;
  using Real = typename Format::Real;
  using Layout = RowLayout<LayoutFormat, kLanes, kPerLane>;
  using Word = typename SortableKeys<Format, kLanes, kPerLane>::Word;
  static constexpr int kPerWord = int(sizeof(Word) / sizeof(Bits));
  static constexpr int64_t kChunkBytes = Layout::kChunk * sizeof(Bits);
  struct alignas(kChunkBytes) Chunk {
    Word words[Layout::kChunk / kPerWord];
  };

  Chunk chunks[Layout::kChunks];

  template <class Launch>
  static __device__ const Bits* at(const Launch& p, int t) {
    return static_cast<const Bits*>(p.logits) + t * p.row_stride;
  }

  static bool aligned(const SelectLaunch& p) {
    return reinterpret_cast<uintptr_t>(p.logits) % kChunkBytes == 0 && p.experts % Layout::kChunk == 0 &&
           p.row_stride % Layout::kChunk == 0;
  }

  template <bool kZeros, class Launch>
  __device__ void load(const Launch& p, Layout layout, int t) {
    const Bits* const logits = at(p, t);
    if (p.aligned) {
#pragma unroll
      for (int c = 0; c < Layout::kChunks; ++c) {
        const int id = layout.first_id(c);
        if (kZeros) chunks[c] = Chunk{};
        if (id < p.experts) chunks[c] = *reinterpret_cast<const Chunk*>(logits + id);
      }
      return;
    }
#pragma unroll
    for (int c = 0; c < Layout::kChunks; ++c) {
      const int id = layout.first_id(c);
#pragma unroll
      for (int w = 0; w < Layout::kChunk / kPerWord; ++w) {
        Bits bits[kPerWord];
#pragma unroll
        for (int i = 0; i < kPerWord; ++i) {
          const int e = id + w * kPerWord + i;
          bits[i] = e < p.experts ? logits[e] : Bits(0);
        }
        memcpy(&chunks[c].words[w], bits, sizeof(Word));
      }
    }
  }

  __device__ Word word(int v) const { return chunks[v / Layout::kChunk].words[v % Layout::kChunk / kPerWord]; }
  __device__ Real value(int v) const { return Format::to_real(Bits(word(v) >> (v % kPerWord * 8 * sizeof(Bits)))); }

  // The softmax over all experts of a logit is exp(logit - this).
  __device__ Real log_sum_exp(const SelectLaunch& p, Layout layout) const {
    Real largest = -INFINITY, sum = 0;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      if (layout.id_at(v) < p.experts) largest = max(largest, value(v));
    }
    largest = subwarp_max<kLanes>(largest);
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      if (layout.id_at(v) < p.experts) sum += exp_of(value(v) - largest);
    }
    return largest + log(subwarp_sum<kLanes>(sum));
  }
};

// Blocks and threads for warps that take `rows` rows at a time: first one block per multiprocessor, then more warps in
// each, then more rows per warp.
struct SelectGrid {
  unsigned blocks, threads;
};

inline SelectGrid select_grid(const SelectLaunch& p, int rows, int most_warps) {
  const int64_t warps = ceil_div<int64_t>(p.tokens, rows);
  const int64_t sms = std::min<int64_t>(num_sms(), kMaxCounterBlocks);
  const int64_t per_block = std::clamp<int64_t>(ceil_div(warps, sms), kMinWarps, most_warps);
  const int64_t blocks = std::clamp<int64_t>(ceil_div(warps, per_block), 1, sms);
  return {unsigned(blocks), unsigned(per_block) * kWarp};
}

template <class Launch>
__device__ __forceinline__ void clear_block_counts(const Launch& p, int32_t* counts, int32_t* invalid) {
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) counts[e] = 0;
  if (threadIdx.x == 0) *invalid = 0;
}

// Adds the block's counts to those of the launch.
template <class Launch>
__device__ __forceinline__ void add_block_counts(const Launch& p, const int32_t* counts, int32_t invalid) {
  for (int e = threadIdx.x; e <= p.experts; e += blockDim.x) {
    const bool is_count = e < p.experts;
    const int32_t number = is_count ? counts[e] : invalid;
    int32_t* const out = is_count ? &p.tokens_per_expert[e] : p.invalid_rows;
    if (p.counter_slot < 0) {
      if (number != 0) atomicAdd(out, number);
    } else {
      counters.add(p.counter_slot, is_count ? e : kInvalid, uint32_t(number), gridDim.x, out);
    }
  }
}

// select_row.cu: everything, a warp per row.
Status launch_warp_per_row(const SelectLaunch& p, Stream stream);

}  // namespace moe::cuda
