// The select kernel in which a sub-warp of kLanes lanes shares a row, holds its logits in registers and extracts the top k
// there (sortable_keys.cuh); lane j then computes the weight of the j-th winner.
//
// There are two variants. The plain one takes the softmax over the winners: no other logit is exponentiated, since the
// denominator of the softmax over all experts cancels. Where it is exact, it has neither mask nor scaling factor. The
// general one supports every score and selection by any scores, in the type of the arithmetic.
#pragma once

#include "select/select_launch.cuh"

namespace moe::cuda {

// Extracts the top k of rows and writes ids, weights and counts. top_k is at most kMaxK, or exactly that (kExact).
template <class Format, int kLanes, int kPerLane, int kMaxK, bool kExact, bool kGeneral>
struct TopK {
  using Real = typename Format::Real;
  using KeyFormat = std::conditional_t<!kGeneral, Format, std::conditional_t<sizeof(Real) == 8, Fp64, Fp32>>;
  using Fragment = RowFragment<Format, kLanes, kPerLane, KeyFormat>;
  using Keys = SortableKeys<KeyFormat, kLanes, kPerLane>;
  using KeyIndex = typename Keys::KeyIndex;
  static constexpr bool kPlain = kExact && !kGeneral;
  using Launch = std::conditional_t<kPlain, PlainLaunch, SelectLaunch>;
  static constexpr int kWinnersPerLane = kMaxK > kLanes ? kMaxK / kLanes : 1;  // j = s * kLanes + lane
  static constexpr int kWinnerLanes = kMaxK < kLanes ? kMaxK : kLanes;   // lanes with any

  const Launch& p;
  int32_t* counts;   // (E) of the block, in shared memory
  int32_t* invalid;
  int lane, top_k;
  typename Fragment::Layout layout;
  typename Keys::LaneIds lane_ids;

  __device__ TopK(const Launch& p, int32_t* counts, int32_t* invalid)
      : p(p),
        counts(counts),
        invalid(invalid),
        lane(threadIdx.x % kLanes),
        top_k(kExact ? kMaxK : p.top_k),
        layout{lane},
        lane_ids(layout) {}

  __device__ Keys keys(const Fragment& row, int t, Real log_sum, bool nan_as_lowest) const {
    Keys keys;
#pragma unroll
    for (int v = 0; v < kPerLane; v += Keys::kPerWord) {
      if constexpr (kGeneral) {
        const int id = layout.id_at(v);
        if (id >= p.experts) continue;
        keys.set(v, KeyFormat::from_real(ranking_score(p, t, id, row.value(v), log_sum)), lane_ids, nan_as_lowest);
      } else {
        keys.set(v, row.word(v), lane_ids, nan_as_lowest);
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

  // Row t, where active. All lanes of the warp must call: they take part in the shuffles.
  __device__ void select_row(const Fragment& row, int t, bool active) const {
    Real log_sum = 0;
    if constexpr (kGeneral) log_sum = needs_log_sum(p) ? row.log_sum_exp(p, layout) : Real(0);
    Keys keys = this->keys(row, active ? t : 0, log_sum, false);
    KeyIndex best = keys.extract_max(lane_ids);
    bool bad = Keys::key_of(best) >= Keys::kPlusInf;
    if (__any_sync(kFullMask, bad)) {  // possibly a NaN
      keys = this->keys(row, active ? t : 0, log_sum, true);
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
    if constexpr (kGeneral) {
      Real logits[kWinnersPerLane], subtracted = log_sum;
#pragma unroll
      for (int s = 0; s < kWinnersPerLane; ++s) {
        const bool has_winner = active && s * kLanes + lane < top_k;
        logits[s] = has_winner ? Format::to_real(Fragment::at(p, t)[Keys::id_of(winners[s])]) : Real(-INFINITY);
      }
      if (p.score == Score::kSoftmax && p.renormalize) {
        subtracted = logits[0];
#pragma unroll
        for (int s = 1; s < kWinnersPerLane; ++s) subtracted = max(subtracted, logits[s]);
        subtracted = subwarp_max<kLanes>(subtracted);
      }
#pragma unroll
      for (int s = 0; s < kWinnersPerLane; ++s) {
        const bool has_winner = active && s * kLanes + lane < top_k;
        weights[s] = has_winner ? score_of(p.score, logits[s], subtracted) : Real(0);
        sum += weights[s];
      }
    } else {
#pragma unroll
      for (int s = 0; s < kWinnersPerLane; ++s) {
        weights[s] = s * kLanes + lane < top_k ? exp_of(Real(Keys::value_of(winners[s])) - top) : Real(0);
        sum += weights[s];
      }
    }
    bool counted = active, renormalize = true;
    Real scale = 1;
    if constexpr (!kPlain) {
      counted = active && (p.mask == nullptr || p.mask[t]);
      renormalize = p.renormalize;
      scale = p.template scaling<Real>();
    }
    if (renormalize) scale *= reciprocal(subwarp_sum<kWinnerLanes>(sum));

    if (bad && counted && lane == 0) atomicAdd(invalid, 1);
#pragma unroll
    for (int s = 0; s < kWinnersPerLane; ++s) {
      const int j = s * kLanes + lane;
      if (active && j < top_k) {
        const int64_t slot = int64_t(t) * top_k + j;
        const int id = Keys::id_of(winners[s]);
        p.expert_ids[slot] = id;
        static_cast<Real*>(p.weights)[slot] = bad ? Real(NAN) : weights[s] * scale;
        if (counted) atomicAdd(&counts[id], 1);
      }
    }
  }
};

template <class Format, int kLanes, int kPerLane, int kMaxK, bool kExact, bool kGeneral>
__global__ void __launch_bounds__(max_warps(kPerLane) * kWarp) 
    select_kernel(const typename TopK<Format, kLanes, kPerLane, kMaxK, kExact, kGeneral>::Launch p) {
  __shared__ int32_t counts[kLanes * kPerLane];
  __shared__ int32_t invalid;
  clear_block_counts(p, counts, &invalid);
  __syncthreads();
  launch_dependent_grids();
  wait_on_dependent_grids();

  using Rows = TopK<Format, kLanes, kPerLane, kMaxK, kExact, kGeneral>;
  const Rows top_k_of(p, counts, &invalid);
  const int tokens = int(p.tokens), rows = blockDim.x / kLanes, stride = gridDim.x * rows;
  int t = blockIdx.x * rows + threadIdx.x / kLanes;
  typename Rows::Fragment row;
  if (t < tokens) row.template load<false>(p, top_k_of.layout, t);
  for (int warp_first = t - threadIdx.x % kWarp / kLanes; warp_first < tokens; warp_first += stride) {
    top_k_of.select_row(row, t, t < tokens);
    t += stride;
    if (t < tokens) row.template load<false>(p, top_k_of.layout, t);
  }

  __syncthreads();
  add_block_counts(p, counts, invalid);
}

template <class Format, int kLanes, int kPerLane, int kMaxK, bool kExact, bool kGeneral>
void launch_select(SelectLaunch p, Stream stream) {
  p.aligned = TopK<Format, kLanes, kPerLane, kMaxK, kExact, kGeneral>::Fragment::aligned(p);
  const SelectGrid grid = select_grid(p, kWarp / kLanes, max_warps(kPerLane));
  using Launch = typename TopK<Format, kLanes, kPerLane, kMaxK, kExact, kGeneral>::Launch;
  const auto kernel = select_kernel<Format, kLanes, kPerLane, kMaxK, kExact, kGeneral>;
  launch_pdl(kernel, grid.blocks, grid.threads, 0, stream, Launch(p));
}

}  // namespace moe::cuda
