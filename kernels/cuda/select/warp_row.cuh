// A warp selects the top k of a row that it holds in registers.
//
// The K-th largest of the lanes' maxima bounds the K-th best expert from below: few experts reach it, about K + 1 of 256.
// These candidates go to shared memory, a lane takes each, and its rank is the number of candidates that come before it.
// So the time hardly depends on K, and no key is extracted from registers.
//
// A row with a NaN or +inf, with fewer than K experts above -inf, or with more candidates than there is room for (many
// equal scores, K near the number of lanes) is scanned once per winner instead, from memory.
#pragma once

#include "select/select_launch.cuh"

namespace moe::cuda {

// What orders the experts: the logits, their sigmoids and the bias, or any scores.
enum class Ranking { kLogits, kSigmoid, kAny };

constexpr int kMaxCandidates = 2 * kWarp;
constexpr int kRankedAtOnce = 4;

template <class Real, int kCount>
struct Candidates {
  alignas(16) Real scores[kCount];
  Real logits[kCount];
  int ids[kCount];

  __device__ void put(int at, Real score, int id, Real logit) {
    scores[at] = score;
    ids[at] = id;
    logits[at] = logit;
  }
};

// Order: score descending, then expert id ascending; -0 equals +0, as they are compared as numbers. Without a branch.
template <class Real>
__device__ __forceinline__ bool before(Real score, int id, Real other, int other_id) {
  return (score > other) | ((score == other) & (id < other_id));
}

// What one warp has in shared memory. Winners: one more than K, for the gaps.
template <class Real>
struct alignas(16) WarpStorage {
  Candidates<Real, kMaxCandidates + kRankedAtOnce> candidates;
  Candidates<Real, kMaxTopK + 1> winners;
};

// Integers that order as the numbers do, but for -0 below +0.
template <class Real>
struct Ordered {
  using Key = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  static constexpr Key kNone = std::numeric_limits<Key>::min();
  static constexpr int kSign = 8 * int(sizeof(Key)) - 1;
  static __device__ Key flip(Key bits) { return bits ^ ((bits >> kSign) & std::numeric_limits<Key>::max()); }
  static __device__ Key key(Real x) { return flip(bit_cast<Key>(x)); }
  static __device__ Real value(Key key) { return bit_cast<Real>(flip(key)); }
};

// Calls use(Format{}) for the formats whose arithmetic is Real.
template <class Real, class Use>
__device__ __forceinline__ auto with_format(DType dtype, const Use& use) {
  if constexpr (sizeof(Real) == 8) return use(Fp64{});
  else if (dtype == DType::kFp32) return use(Fp32{});
  else if (dtype == DType::kFp16) return use(Fp16{});
  else return use(Bf16{});
}

template <class Real, int kPerLane, Ranking kRanking>
struct WarpRow {
  using KeyFormat = std::conditional_t<sizeof(Real) == 8, Fp64, Fp32>;
  using Layout = RowLayout<KeyFormat, kWarp, kPerLane>;
  template <class Format>
  using Fragment = RowFragment<Format, kWarp, kPerLane, KeyFormat>;
  static constexpr int kChunk = Layout::kChunk, kChunks = kPerLane / kChunk;
  using Order = Ordered<Real>;
  using Key = typename Order::Key;

  const SelectLaunch& p;
  WarpStorage<Real>& storage;
  Real* group_scores;  // (E) of the warp, in shared memory, where there are groups
  const int lane;
  const Layout layout;
  const int rounds;    // winners wanted
  const bool grouped;
  int group_size;
  int group_shift;     // 1 << this lanes add up the scores of a group, a power of two that divides its size
  int first_step;      // each group begins at another one: other banks of shared memory
  int lanes_shift;     // 1 << this lanes hold the chunks of a group; -1: not so
  Real bias[kPerLane];

  __device__ WarpRow(const SelectLaunch& p, WarpStorage<Real>& storage, Real* group_scores)
      : p(p),
        storage(storage),
        group_scores(group_scores),
        lane(threadIdx.x % kWarp),
        layout{lane},
        rounds(p.top_k + (p.gap_counts != nullptr)),
        grouped(kRanking != Ranking::kLogits && p.topk_group < p.n_group),
        group_size(p.experts / p.n_group),
        group_shift(0) {
    while (p.n_group << (group_shift + 1) <= kWarp && group_size % (2 << group_shift) == 0) ++group_shift;
    first_step = (lane >> group_shift) % (group_size >> group_shift);
    const int lanes = group_size / kChunk;
    const bool whole = group_size % kChunk == 0 && lanes <= kWarp && (lanes & (lanes - 1)) == 0;
    lanes_shift = whole ? __ffs(lanes) - 1 : -1;
  }

  __device__ void load_bias() {
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      const int id = layout.id_at(v);
      bias[v] = kRanking != Ranking::kLogits && p.bias != nullptr && id < p.experts ? Real(p.bias[id]) : Real(0);
    }
  }

  __device__ void load(int t, Real (&logits)[kPerLane]) const {
    with_format<Real>(p.dtype, [&](auto format) {
      Fragment<decltype(format)> row;
      row.load(p, layout, t);
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) logits[v] = row.value(v);
    });
  }

  // The softmax over all experts of a logit is exp(logit - this).
  __device__ Real log_sum_exp(const Real (&logits)[kPerLane]) const {
    Real largest = -INFINITY, sum = 0;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      if (layout.id_at(v) < p.experts) largest = max(largest, logits[v]);
    }
    largest = subwarp_max<kWarp>(largest);
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      if (layout.id_at(v) < p.experts) sum += exp_of(logits[v] - largest);
    }
    return largest + log(subwarp_sum<kWarp>(sum));
  }

  // Puts the winners of row t, best first, into storage; false if the row is invalid. Leaves the ranking scores of the
  // lane's experts, -inf beyond the last.
  __device__ bool select(int t, const Real (&logits)[kPerLane], Real log_sum, Real (&scores)[kPerLane]) const {
    Real zero = 0;  // NaN where a number is not finite
    rank(t, logits, log_sum, scores, zero);
    bool bad = false;
    if (!__all_sync(kFullMask, zero == 0)) {
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        if (!(logits[v] - logits[v] == 0)) scores[v] = logits[v];
        bad |= !(scores[v] < Real(INFINITY));
      }
      bad = __any_sync(kFullMask, bad);
    }
    if (p.experts < kWarp * kPerLane) {
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) scores[v] = layout.id_at(v) < p.experts ? scores[v] : Real(-INFINITY);
    }
    unsigned kept = kFullMask;
    if (grouped && !bad) kept = keep_best_groups(scores);
    if (!bad && take_candidates(logits, scores)) return true;
    if (grouped && bad) {
      const auto score = [&](int id) { return scan_score(score_at(t, id, log_sum), true); };
      kept = best_groups(score);
    }
    return scan(t, log_sum, kept);
  }

 private:
  __device__ void rank(int t, const Real (&logits)[kPerLane], Real log_sum, Real (&scores)[kPerLane], Real& zero) const {
    const auto each = [&](const auto& score) {
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        scores[v] = score(v, logits[v]);
        zero += Real(0) * logits[v];
      }
    };
    if constexpr (kRanking == Ranking::kLogits) {
      each([](int, Real logit) { return logit; });
    } else if constexpr (kRanking == Ranking::kSigmoid) {
      // The error of these instructions is below the rounding of the sum.
      each([&](int v, Real logit) { return reciprocal_of(1 + exp_of(-logit)) + bias[v]; });
    } else if (p.selection_scores != nullptr) {
      each([&](int v, Real) {
        const int id = layout.id_at(v);
        return id < p.experts ? Real(p.selection_scores[int64_t(t) * p.experts + id]) : Real(0);
      });
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) zero += Real(0) * scores[v];
    } else if (!ranks_by_score(p)) {
      each([](int, Real logit) { return logit; });
    } else {
      each([&](int v, Real logit) { return score_of(p.score, logit, log_sum) + bias[v]; });
    }
    if (kRanking != Ranking::kLogits) zero += bias_zero();
  }

  __device__ Real bias_zero() const {
    Real zero = 0;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) zero += Real(0) * bias[v];
    return zero;
  }

  static __device__ float reciprocal_of(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ double reciprocal_of(double x) { return 1 / x; }

  struct BestTwo {
    Real first = -INFINITY, second = -INFINITY;

    __device__ void add(Real score) {
      second = max(second, min(first, score));
      first = max(first, score);
    }
    __device__ void merge(const BestTwo& other) {
      second = max(max(second, other.second), min(first, other.first));
      first = max(first, other.first);
    }
    __device__ BestTwo of_lane(int apart) const {
      return {__shfl_xor_sync(kFullMask, first, apart), __shfl_xor_sync(kFullMask, second, apart)};
    }
    __device__ Real sum(int size) const { return size == 1 ? first : first + second; }
  };

  // A bit per group, whether it is one of those with the highest sums of their two best scores, by score(expert).
  template <class ScoreOf>
  __device__ unsigned best_groups(const ScoreOf& score) const {
    const int own = lane >> group_shift;
    BestTwo best;
    if (own < p.n_group) for_each_of_group([&](int id) { best.add(score(id)); });
    for (int apart = 1; apart < 1 << group_shift; apart *= 2) best.merge(best.of_lane(apart));
    Real sum = best.sum(group_size);
    sum = sum == sum ? sum : Real(-INFINITY);
    const unsigned lanes = __ballot_sync(kFullMask, is_best(sum, own, group_shift));
    return __ballot_sync(kFullMask, lane < p.n_group && (lanes >> (lane << group_shift) & 1));
  }

  // Of a group's sum; that of group g is in lane g << shift.
  __device__ bool is_best(Real sum, int group, int shift) const {
    int better = 0;
#pragma unroll 4
    for (int g = 0; g < p.n_group; ++g) better += before(__shfl_sync(kFullMask, sum, g << shift), g, sum, group);
    return better < p.topk_group;
  }

  // The lanes of a group share its experts.
  template <class Use>
  __device__ void for_each_of_group(const Use& use) const {
    const int steps = group_size >> group_shift, own = lane >> group_shift;
    const int begin = own * group_size + (lane & ((1 << group_shift) - 1));
    int step = first_step;
#pragma unroll 4
    for (int i = 0; i < steps; ++i) {
      use(begin + (step << group_shift));
      step = step + 1 == steps ? 0 : step + 1;
    }
  }

  // Sets the scores of the other groups to -inf. Returns a bit per group, whether it is kept.
  __device__ unsigned keep_best_groups(Real (&scores)[kPerLane]) const {
    const unsigned kept = lanes_shift >= 0 ? best_groups_of_lanes(scores) : best_groups_of_memory(scores);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const int group = lanes_shift >= 0 ? (c * kWarp + lane) >> lanes_shift : (layout.first_id(c) + i) / group_size;
        if (!(kept >> group & 1)) scores[c * kChunk + i] = -INFINITY;
      }
    }
    return kept;
  }

  // Where a power of two of lanes holds a group.
  __device__ unsigned best_groups_of_lanes(const Real (&scores)[kPerLane]) const {
    const int own = lane << lanes_shift;  // the first lane of the group of this number, counted over all chunks
    Real sum = -INFINITY;                 // of the group of this lane's number
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      BestTwo best;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) best.add(scores[c * kChunk + i]);
      for (int apart = 1; apart < 1 << lanes_shift; apart *= 2) best.merge(best.of_lane(apart));
      const Real other = __shfl_sync(kFullMask, best.sum(group_size), own % kWarp);
      if (own / kWarp == c) sum = other;
    }
    const bool is_group = lane < p.n_group;
    const Key key = is_group ? Order::key(sum + Real(0)) : Order::kNone;
    Key left = key, least = 0;
    for (int j = 0; j < p.topk_group; ++j) {
      least = subwarp_max<kWarp>(left);
      left = left == least ? Order::kNone : left;
    }
    const unsigned kept = __ballot_sync(kFullMask, is_group && key >= least);
    if (__popc(kept) == p.topk_group) return kept;
    const bool best = is_best(sum, lane, 0);
    return __ballot_sync(kFullMask, is_group && best);
  }

  __device__ unsigned best_groups_of_memory(const Real (&scores)[kPerLane]) const {
    __syncwarp();
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      if (layout.id_at(v) < p.experts) group_scores[layout.id_at(v)] = scores[v];
    }
    __syncwarp();
    return best_groups([&](int id) { return group_scores[id]; });
  }

  __device__ bool is_kept(unsigned groups, int id) const { return groups >> (id / group_size) & 1; }

  // False if there are more candidates than room, or none is above -inf.
  __device__ bool take_candidates(const Real (&logits)[kPerLane], const Real (&scores)[kPerLane]) const {
    Real largest = scores[0];
#pragma unroll
    for (int v = 1; v < kPerLane; ++v) largest = max(largest, scores[v]);
    Key key = Order::key(largest), least = 0;
#pragma unroll 4
    for (int j = 0; j < rounds; ++j) {
      least = subwarp_max<kWarp>(key);
      key = key == least ? Order::kNone : key;
    }
    const Real threshold = Order::value(least);
    if (!(threshold > Real(-INFINITY))) return false;  // or NaN: fewer than K different maxima

    Real reached = 0;  // a number, which is fewer instructions than a count
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) reached += scores[v] >= threshold ? Real(1) : Real(0);
    const int own = int(reached);
    const unsigned lower = (1u << lane) - 1;
    unsigned lanes = __ballot_sync(kFullMask, own & 1);
    int at = __popc(lanes & lower), count = __popc(lanes);  // of the lane's first candidate; of all
    for (int bit = 1; __any_sync(kFullMask, own >> bit); ++bit) {
      lanes = __ballot_sync(kFullMask, own >> bit & 1);
      at += __popc(lanes & lower) << bit;
      count += __popc(lanes) << bit;
    }
    if (count > kMaxCandidates) return false;
    __syncwarp();
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      if (scores[v] >= threshold) storage.candidates.put(at++, scores[v], layout.id_at(v), logits[v]);
    }
    if (lane < kRankedAtOnce) storage.candidates.scores[count + lane] = -INFINITY;
    __syncwarp();
    // Without looking at ids at first: where scores tie, two candidates write to one place, and one finds another there.
    if (count > kWarp || !rank_candidates<false>(count)) rank_candidates<true>(count);
    return true;
  }

  // Moves the best candidates to the winners. False if two of these met.
  template <bool kTies>
  __device__ bool rank_candidates(int count) const {
    const auto& all = storage.candidates;
    bool met = false;
    for (int first = 0; first < count; first += kWarp) {
      const int own = min(first + lane, kMaxCandidates - 1), id = all.ids[own];
      const Real score = all.scores[own];
      Real earlier = 0;
#pragma unroll 1
      for (int i = 0; i < count; i += kRankedAtOnce) {
#pragma unroll
        for (int u = 0; u < kRankedAtOnce; ++u) {
          const Real other = all.scores[i + u];
          const bool is_before = kTies ? before(other, all.ids[i + u], score, id) : other > score;
          earlier += is_before ? Real(1) : Real(0);
        }
      }
      const int rank = int(earlier);
      const bool wins = first + lane < count && rank < rounds;
      if (wins) storage.winners.put(rank, score, id, all.logits[own]);
      __syncwarp();
      if (!kTies) met |= wins && storage.winners.ids[rank] != id;
    }
    return !__any_sync(kFullMask, met);
  }

  __device__ Real logit_at(int t, int id) const {
    return with_format<Real>(p.dtype, [&](auto format) -> Real {
      using Format = decltype(format);
      return Format::to_real(Fragment<Format>::at(p, t)[id]);
    });
  }

  __device__ Real score_at(int t, int id, Real log_sum) const {
    return ranking_score(p, t, id, logit_at(t, id), log_sum);
  }

  // NaN counts as -inf, and so does a finite score of a group that is left out.
  static __device__ Real scan_score(Real score, bool kept) {
    if (score == Real(INFINITY)) return score;
    return score == score && kept ? score : Real(-INFINITY);
  }

  // The slow way: one pass over the row for each winner. False if the row is invalid.
  __device__ bool scan(int t, Real log_sum, unsigned kept) const {
    bool bad = false;
    Real last = INFINITY;
    int last_id = -1;
#pragma unroll 1
    for (int j = 0; j < rounds; ++j) {
      Real best = -INFINITY;
      int best_id = kMaxExperts;
#pragma unroll 1
      for (int e = lane; e < p.experts; e += kWarp) {
        Real score = score_at(t, e, log_sum);
        bad |= !(score < Real(INFINITY));
        score = scan_score(score, !grouped || is_kept(kept, e));
        const bool better = before(last, last_id, score, e) & before(score, e, best, best_id);
        best = better ? score : best;
        best_id = better ? e : best_id;
      }
#pragma unroll
      for (int apart = kWarp / 2; apart > 0; apart /= 2) {
        const Real other = __shfl_xor_sync(kFullMask, best, apart);
        const int other_id = __shfl_xor_sync(kFullMask, best_id, apart);
        const bool better = before(other, other_id, best, best_id);
        best = better ? other : best;
        best_id = better ? other_id : best_id;
      }
      if (lane == 0) storage.winners.put(j, best, best_id, logit_at(t, best_id));
      bad |= j == p.top_k - 1 && best == Real(-INFINITY);
      last = best;
      last_id = best_id;
    }
    __syncwarp();
    return !__any_sync(kFullMask, bad);
  }
};

}  // namespace moe::cuda
