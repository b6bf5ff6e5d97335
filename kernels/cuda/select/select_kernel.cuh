// The select kernel. A sub-warp of kLanes lanes shares a row, holds its logits in registers and extracts the top k there
// (sortable_keys.cuh); lane j then computes the weight of the j-th winner.
//
// There are two variants. The plain one takes the softmax over the winners: no other logit is exponentiated, since the
// denominator of the softmax over all experts cancels. The general one supports every score and selection by any scores,
// in the type of the arithmetic.
#pragma once

#include "common/fast_math.cuh"
#include "select/sortable_keys.cuh"
#include "select.h"
#include "select/block_counters.cuh"

namespace moe::cuda {

constexpr int kMinWarps = 8;      // of a block

// Per block, by registers. At most one block per multiprocessor: every block adds to every count, and atomics to one
// address serialise.
constexpr int max_warps(int per_lane) { return per_lane > 16 ? 16 : 32; }

static __device__ LastBlockCounter<kMaxExperts + 1> counters;
constexpr int kInvalid = kMaxExperts;  // its counter

struct SelectLaunch : SelectParams {
  int counter_slot;
  bool aligned;  // chunks of logits may be loaded at once
};

template <class Real>
__device__ Real sigmoid(Real x) {
  return Real(1) / (Real(1) + exp(-x));
}

// A lane's fragment of a row, as it is in memory.
template <class Format, int kLanes, int kPerLane, bool kGeneral>
struct RowFragment {
  using Bits = typename Format::Bits;
  using Real = typename Format::Real;
  using KeyFormat = std::conditional_t<!kGeneral, Format, std::conditional_t<sizeof(Real) == 8, Fp64, Fp32>>;
  using Layout = RowLayout<KeyFormat, kLanes, kPerLane>;
  using Keys = SortableKeys<KeyFormat, kLanes, kPerLane>;
  using Word = typename SortableKeys<Format, kLanes, kPerLane>::Word;
  static constexpr int kPerWord = int(sizeof(Word) / sizeof(Bits));
  struct alignas(sizeof(Bits) * Layout::kChunk) Chunk {
    Word words[Layout::kChunk / kPerWord];
  };

  Chunk chunks[Layout::kChunks];

  static __device__ const Bits* at(const SelectLaunch& p, int t) {
    return static_cast<const Bits*>(p.logits) + t * p.row_stride;
  }

  __device__ void load(const SelectLaunch& p, Layout layout, int t) {
    const Bits* const logits = at(p, t);
#pragma unroll
    for (int c = 0; c < Layout::kChunks; ++c) {
      const int id = layout.first_id(c);
      if (p.aligned) {
        if (id < p.experts) chunks[c] = *reinterpret_cast<const Chunk*>(logits + id);
        continue;
      }
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

  __device__ Keys keys(const SelectLaunch& p, const typename Keys::LaneIds& lane_ids, Layout layout, int t,
                         bool nan_as_lowest) const {
    Keys keys;
#pragma unroll
    for (int v = 0; v < kPerLane; v += Keys::kPerWord) {
      if constexpr (kGeneral) {
        const int id = layout.id_at(v);
        if (id < p.experts) keys.set(v, KeyFormat::from_real(selection_score(p, t, id, value(v))), lane_ids, nan_as_lowest);
      } else {
        keys.set(v, word(v), lane_ids, nan_as_lowest);
      }
    }
    if (p.experts < kLanes * kPerLane) {
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        if (layout.id_at(v) >= p.experts) keys.clear(v);
      }
    }
    return keys;
  }

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

// Extracts the top k of rows and writes ids, weights and counts. top_k is at most kMaxK, or exactly that (kExact).
template <class Format, int kLanes, int kPerLane, int kMaxK, bool kExact, bool kGeneral>
struct TopK {
  using Fragment = RowFragment<Format, kLanes, kPerLane, kGeneral>;
  using Keys = typename Fragment::Keys;
  using KeyIndex = typename Keys::KeyIndex;
  using Real = typename Format::Real;
  static constexpr int kWinnersPerLane = kMaxK > kLanes ? kMaxK / kLanes : 1;  // j = s * kLanes + lane
  static constexpr int kWinnerLanes = kMaxK < kLanes ? kMaxK : kLanes;   // lanes with any

  const SelectLaunch& p;
  int32_t* counts;   // (E) of the block, in shared memory
  int32_t* invalid;
  int lane, top_k;
  typename Fragment::Layout layout;
  typename Keys::LaneIds lane_ids;

  __device__ TopK(const SelectLaunch& p, int32_t* counts, int32_t* invalid)
      : p(p),
        counts(counts),
        invalid(invalid),
        lane(threadIdx.x % kLanes),
        top_k(kExact ? kMaxK : p.top_k),
        layout{lane},
        lane_ids(layout) {}

  // Row t, where active. All lanes of the warp must call: they take part in the shuffles.
  __device__ void select_row(const Fragment& row, int t, bool active) const {
    Keys keys = row.keys(p, lane_ids, layout, active ? t : 0, false);
    KeyIndex best = keys.extract_max(lane_ids);
    bool bad = Keys::key_of(best) >= Keys::kPlusInf;
    if (__any_sync(kFullMask, bad)) {  // possibly a NaN
      keys = row.keys(p, lane_ids, layout, active ? t : 0, true);
      best = keys.extract_max(lane_ids);
    }
    const Real top = Real(Keys::value_of(best));
    KeyIndex winners[kWinnersPerLane];
    const auto keep = [&](int j) {
#pragma unroll
      for (int s = 0; s < kWinnersPerLane; ++s) winners[s] = s * kLanes + lane == j ? best : winners[s];
    };
    keep(0);
    if constexpr (kExact) {
#pragma unroll
      for (int j = 1; j < kMaxK; ++j) {
        best = keys.extract_max(lane_ids);
        keep(j);
      }
    } else {
      for (int j = 1; j < p.top_k; ++j) {
        best = keys.extract_max(lane_ids);
        keep(j);
      }
    }
    bad |= Keys::key_of(best) == Keys::kMinusInf;  // the last one is the smallest

    Real weights[kWinnersPerLane], sum = 0;
    Real log_all = top;
    if (kGeneral && p.score == Score::kSoftmax && !p.renormalize) log_all = row.log_sum_exp(p, layout);
#pragma unroll
    for (int s = 0; s < kWinnersPerLane; ++s) {
      const bool has_winner = s * kLanes + lane < top_k;
      if constexpr (kGeneral) {
        weights[s] = 0;
        if (has_winner && active) {
          const Real logit = Format::to_real(Fragment::at(p, t)[Keys::id_of(winners[s])]);
          weights[s] = p.score == Score::kSigmoid ? sigmoid(logit) : exp_of(logit - log_all);
        }
      } else {
        weights[s] = has_winner ? exp_of(Real(Keys::value_of(winners[s])) - top) : Real(0);
      }
      sum += weights[s];
    }
    Real scale = 1;
    if (!kGeneral || p.renormalize) scale = reciprocal(subwarp_sum<kWinnerLanes>(sum));

    if (bad && active && lane == 0) atomicAdd(invalid, 1);
#pragma unroll
    for (int s = 0; s < kWinnersPerLane; ++s) {
      const int j = s * kLanes + lane;
      if (active && j < top_k) {
        const int64_t slot = int64_t(t) * top_k + j;
        const int id = Keys::id_of(winners[s]);
        p.expert_ids[slot] = id;
        static_cast<Real*>(p.weights)[slot] = bad ? Real(NAN) : weights[s] * scale;
        atomicAdd(&counts[id], 1);
      }
    }
  }
};

__device__ __forceinline__ void clear_block_counts(const SelectLaunch& p, int32_t* counts, int32_t* invalid) {
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) counts[e] = 0;
  if (threadIdx.x == 0) *invalid = 0;
  __syncthreads();
}

// Adds the block's counts to those of the launch.
__device__ __forceinline__ void add_block_counts(const SelectLaunch& p, const int32_t* counts, int32_t invalid) {
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

template <class Format, int kLanes, int kPerLane, int kMaxK, bool kExact, bool kGeneral>
__global__ void __launch_bounds__(max_warps(kPerLane) * kWarp) select_kernel(const SelectLaunch p) {
  __shared__ int32_t counts[kLanes * kPerLane];
  __shared__ int32_t invalid;
  clear_block_counts(p, counts, &invalid);
  launch_dependent_grids();
  wait_on_dependent_grids();

  const TopK<Format, kLanes, kPerLane, kMaxK, kExact, kGeneral> top_k_of(p, counts, &invalid);
  const int tokens = int(p.tokens), rows = blockDim.x / kLanes, stride = gridDim.x * rows;
  int t = blockIdx.x * rows + threadIdx.x / kLanes;
  RowFragment<Format, kLanes, kPerLane, kGeneral> row;
  if (t < tokens) row.load(p, top_k_of.layout, t);
  for (int warp_first = t - threadIdx.x % kWarp / kLanes; warp_first < tokens; warp_first += stride) {
    top_k_of.select_row(row, t, t < tokens);
    t += stride;
    if (t < tokens) row.load(p, top_k_of.layout, t);
  }

  __syncthreads();
  add_block_counts(p, counts, invalid);
}

template <class Format, int kLanes, int kPerLane, int kMaxK, bool kExact, bool kGeneral>
void launch_select(SelectLaunch p, Stream stream) {
  using Layout = typename RowFragment<Format, kLanes, kPerLane, kGeneral>::Layout;
  constexpr int64_t kChunkBytes = Layout::kChunk * sizeof(typename Format::Bits);
  p.aligned = reinterpret_cast<uintptr_t>(p.logits) % kChunkBytes == 0 && p.experts % Layout::kChunk == 0 &&
              p.row_stride % Layout::kChunk == 0;
  // First one block per multiprocessor, then more warps in each, then more rows per warp.
  const int64_t warps = ceil_div<int64_t>(p.tokens, kWarp / kLanes);
  const int64_t sms = std::min<int64_t>(num_sms(), kMaxCounterBlocks);
  const int64_t per_block = std::clamp<int64_t>(ceil_div(warps, sms), kMinWarps, max_warps(kPerLane));
  const int64_t blocks = std::clamp<int64_t>(ceil_div(warps, per_block), 1, sms);
  const auto kernel = select_kernel<Format, kLanes, kPerLane, kMaxK, kExact, kGeneral>;
  launch_pdl(kernel, unsigned(blocks), unsigned(per_block) * kWarp, 0, stream, p);
}

// select_general.cu
void launch_general(const SelectLaunch& p, Stream stream);

}  // namespace moe::cuda
