// A warp selects the top k of a row: held in registers, or, the slow way, scanned in memory once per winner.
//
// In registers, the K-th largest of the lanes' maxima bounds the K-th best expert from below: few experts reach it, about
// K + 1 of 256. These candidates go to shared memory, a lane takes each, and its rank is the number of candidates that come
// before it. So the time hardly depends on K, and no key is extracted from registers.
//
// Scanned are rows with a NaN or +inf, with fewer than K experts above -inf, or with more candidates than there is room for
// (many equal scores, K near the number of lanes), and those of fp64.
#pragma once

#include "select/warp_groups.cuh"

namespace moe::cuda {

// What orders the experts: the logits, their sigmoids and the bias, or any scores.
enum class Ranking { kLogits, kSigmoid, kAny };

constexpr int kMaxCandidates = 2 * kWarp;
constexpr int kRankedAtOnce = 4;

// What one warp has in shared memory. Winners: those of a batch of rows, at the lanes that write them, and last the expert
// behind them, from which gaps are counted.
template <class Real, int kCount>
struct Experts {
  alignas(16) Real scores[kCount];
  Real logits[kCount];
  int ids[kCount];

  __device__ void put(int at, Real score, int id, Real logit) {
    scores[at] = score;
    ids[at] = id;
    logits[at] = logit;
  }
};

template <class Real>
struct alignas(16) WarpStorage {
  Experts<Real, kMaxCandidates + kRankedAtOnce> candidates;
  Experts<Real, kWarp + 1> winners;
};

// Integers that order as the numbers do, but for -0 below +0.
struct OrderedFloat {
  static constexpr int kNone = std::numeric_limits<int>::min();
  static __device__ int flip(int bits) { return bits ^ ((bits >> 31) & std::numeric_limits<int>::max()); }
  static __device__ int key(float x) { return flip(bit_cast<int>(x)); }
  static __device__ float value(int key) { return bit_cast<float>(flip(key)); }
};

// Calls use(Format{}) for the formats whose arithmetic is Real.
template <class Real, class Use>
__device__ __forceinline__ auto with_format(DType dtype, const Use& use) {
  if constexpr (sizeof(Real) == 8) return use(Fp64{});
  else if (dtype == DType::kFp32) return use(Fp32{});
  else if (dtype == DType::kFp16) return use(Fp16{});
  else return use(Bf16{});
}

// A row in memory.
template <class Real>
struct ScannedRow {
  const SelectLaunch& p;
  WarpStorage<Real>& storage;
  const WarpGroups<Real> groups;
  const int lane;
  const int rounds;  // winners wanted: one more than K, for the gaps
  const bool grouped;
  int t = 0;
  Real row_log_sum = 0;  // the softmax over all experts of a logit is exp(logit - this)

  static bool aligned(const SelectLaunch&) { return false; }

  __device__ ScannedRow(const SelectLaunch& p, WarpStorage<Real>& storage, Real*)
      : p(p),
        storage(storage),
        groups(p, threadIdx.x % kWarp),
        lane(threadIdx.x % kWarp),
        rounds(p.top_k + (p.gap_counts != nullptr)),
        grouped(p.topk_group < p.n_group) {}

  __device__ void load(int row) {
    t = row;
    if (!needs_log_sum(p)) return;
    Real largest = -INFINITY, sum = 0;
    for (int e = lane; e < p.experts; e += kWarp) largest = max(largest, logit_at(e));
    largest = subwarp_max<kWarp>(largest);
    for (int e = lane; e < p.experts; e += kWarp) sum += exp_of(logit_at(e) - largest);
    row_log_sum = largest + log(subwarp_sum<kWarp>(sum));
  }

  __device__ Real log_sum() const { return row_log_sum; }

  // Puts the winners, best first, into storage from `begin` on; false if the row is invalid.
  __device__ bool select(int begin) const {
    unsigned kept = kFullMask;
    if (grouped) kept = groups.best([&](int id) { return cleaned(score_at(id), true); });
    bool bad = false;
    Real last = INFINITY;
    int last_id = -1;
#pragma unroll 1
    for (int j = 0; j < rounds; ++j) {
      Real best = -INFINITY;
      int best_id = kMaxExperts;
#pragma unroll 1
      for (int e = lane; e < p.experts; e += kWarp) {
        Real score = score_at(e);
        bad |= !(score < Real(INFINITY));
        score = cleaned(score, !grouped || groups.is_kept(kept, e));
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
      if (lane == 0) storage.winners.put(j == p.top_k ? kWarp : begin + j, best, best_id, logit_at(best_id));
      bad |= j == p.top_k - 1 && best == Real(-INFINITY);
      last = best;
      last_id = best_id;
    }
    __syncwarp();
    return !__any_sync(kFullMask, bad);
  }

  // Calls use(place, score) for the lane's experts. Places of one call in a warp are neighbours.
  template <class Use>
  __device__ void each_score(const Use& use) const {
    for (int e = lane; e < p.experts; e += kWarp) use(place(e), score_at(e));
  }
  static __device__ int place(int id) { return id; }

 private:
  __device__ Real logit_at(int id) const {
    return with_format<Real>(p.dtype, [&](auto format) -> Real {
      using Format = decltype(format);
      return Format::to_real((static_cast<const typename Format::Bits*>(p.logits) + t * p.row_stride)[id]);
    });
  }
  __device__ Real score_at(int id) const { return ranking_score(p, t, id, logit_at(id), row_log_sum); }

  // NaN counts as -inf, and so does a finite score of a group that is left out.
  static __device__ Real cleaned(Real score, bool kept) {
    if (score == Real(INFINITY)) return score;
    return score == score && kept ? score : Real(-INFINITY);
  }
};

// A row in registers, in fp32.
template <int kPerLane, Ranking kRanking>
struct WarpRow {
  using Layout = RowLayout<Fp32, kWarp, kPerLane>;
  template <class Format>
  using Fragment = RowFragment<Format, kWarp, kPerLane, Fp32>;
  using Order = OrderedFloat;
  static constexpr int kChunk = Layout::kChunk, kChunks = kPerLane / kChunk;

  ScannedRow<float> scanned;
  float* group_scores;   // (E) of the warp, in shared memory, where there are groups
  const Layout layout;
  const bool grouped;
  const bool has_log_sum;
  int lanes_shift;       // 1 << this lanes hold the chunks of a group; -1: not so
  float bias[kPerLane], bias_zero = 0;
  float logits[kPerLane], scores[kPerLane];  // scores: -inf beyond the last expert

  static bool aligned(const SelectLaunch& p) {
    switch (p.dtype) {
      case DType::kFp64: return false;
      case DType::kFp32: return Fragment<Fp32>::aligned(p);
      case DType::kFp16: return Fragment<Fp16>::aligned(p);
      case DType::kBf16: return Fragment<Bf16>::aligned(p);
    }
    return false;
  }

  __device__ WarpRow(const SelectLaunch& p, WarpStorage<float>& storage, float* group_scores)
      : scanned(p, storage, nullptr),
        group_scores(group_scores),
        layout{scanned.lane},
        grouped(kRanking != Ranking::kLogits && scanned.grouped),
        has_log_sum(needs_log_sum(p)) {
    const int lanes = scanned.groups.size / kChunk;
    const bool whole = scanned.groups.size % kChunk == 0 && lanes <= kWarp && (lanes & (lanes - 1)) == 0;
    lanes_shift = whole ? __ffs(lanes) - 1 : -1;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      const int id = layout.id_at(v);
      bias[v] = kRanking != Ranking::kLogits && p.bias != nullptr && id < p.experts ? p.bias[id] : 0.0f;
      bias_zero += 0.0f * bias[v];
    }
  }

  __device__ void load(int t) {
    const SelectLaunch& p = scanned.p;
    scanned.t = t;
    with_format<float>(p.dtype, [&](auto format) {
      Fragment<decltype(format)> row;
      row.template load<true>(p, layout, t);
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) logits[v] = row.value(v);
    });
    if (!has_log_sum) return;
    float largest = -INFINITY, sum = 0;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) largest = fmaxf(largest, inside(v) ? logits[v] : -INFINITY);
    largest = subwarp_max<kWarp>(largest);
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) sum += inside(v) ? exp_of(logits[v] - largest) : 0.0f;
    scanned.row_log_sum = largest + log(subwarp_sum<kWarp>(sum));
  }

  __device__ float log_sum() const { return scanned.row_log_sum; }

  // See ScannedRow.
  __device__ bool select(int begin) {
    float zero = 0;  // NaN where a number is not finite
    rank(zero);
    bool bad = false;
    if (!__all_sync(kFullMask, zero == 0)) {
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        if (!(logits[v] - logits[v] == 0)) scores[v] = logits[v];
        bad |= !(scores[v] < INFINITY);
      }
      bad = __any_sync(kFullMask, bad);
    }
    if (bad) return scanned.select(begin);
    if (scanned.p.experts < kWarp * kPerLane) {
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) scores[v] = inside(v) ? scores[v] : -INFINITY;
    }
    if (grouped) keep_best_groups();
    return take_candidates(begin) || scanned.select(begin);
  }

  template <class Use>
  __device__ void each_score(const Use& use) const {
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) use(v * kWarp + scanned.lane, scores[v]);
  }
  static __device__ int place(int id) {
    const int chunk = id / kChunk;
    return (chunk / kWarp * kChunk + id % kChunk) * kWarp + chunk % kWarp;
  }

 private:
  __device__ bool inside(int v) const { return layout.id_at(v) < scanned.p.experts; }

  __device__ void rank(float& zero) {
    const SelectLaunch& p = scanned.p;
    const auto each = [&](const auto& score) {
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        scores[v] = score(v, logits[v]);
        zero += 0.0f * logits[v];
      }
    };
    if constexpr (kRanking == Ranking::kLogits) {
      each([](int, float logit) { return logit; });
    } else if constexpr (kRanking == Ranking::kSigmoid) {
      // The error of these instructions is below the rounding of the sum.
      each([&](int v, float logit) { return reciprocal_of(1 + exp_of(-logit)) + bias[v]; });
    } else if (p.selection_scores != nullptr) {
      const float* const given = p.selection_scores + int64_t(scanned.t) * p.experts;
      each([&](int v, float) { return inside(v) ? given[layout.id_at(v)] : 0.0f; });
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) zero += 0.0f * scores[v];
    } else if (!ranks_by_score(p)) {
      each([](int, float logit) { return logit; });
    } else {
      each([&](int v, float logit) { return score_of(p.score, logit, scanned.row_log_sum) + bias[v]; });
    }
    if (kRanking != Ranking::kLogits) zero += bias_zero;
  }

  static __device__ float reciprocal_of(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  // Sets the scores of the other groups to -inf.
  __device__ void keep_best_groups() {
    const unsigned kept = lanes_shift >= 0 ? best_groups_of_lanes() : best_groups_of_memory();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const int id = layout.first_id(c) + i;
        const int group = lanes_shift >= 0 ? (c * kWarp + scanned.lane) >> lanes_shift : id / scanned.groups.size;
        if (!(kept >> group & 1)) scores[c * kChunk + i] = -INFINITY;
      }
    }
  }

  // Where a power of two of lanes holds a group.
  __device__ unsigned best_groups_of_lanes() const {
    const auto& groups = scanned.groups;
    const int own = scanned.lane << lanes_shift;  // the first lane of the group of this number, counted over all chunks
    float sum = -INFINITY;                        // of the group of this lane's number
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      BestTwo<float> best;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) best.add(scores[c * kChunk + i]);
      if (lanes_shift == 3) best.merge_lanes(8);  // as in DeepSeek-V3, unrolled
      else best.merge_lanes(1 << lanes_shift);
      const float other = __shfl_sync(kFullMask, best.sum(groups.size), own % kWarp);
      if (own / kWarp == c) sum = other;
    }
    const bool is_group = scanned.lane < groups.count;
    const int key = is_group ? Order::key(sum + 0.0f) : Order::kNone;
    int left = key, least = 0;
#pragma unroll 4
    for (int j = 0; j < groups.wanted; ++j) {
      least = subwarp_max<kWarp>(left);
      left = left == least ? Order::kNone : left;
    }
    const unsigned kept = __ballot_sync(kFullMask, is_group && key >= least);
    if (__popc(kept) == groups.wanted) return kept;
    const bool best = groups.is_best(sum, scanned.lane, 0);
    return __ballot_sync(kFullMask, is_group && best);
  }

  __device__ unsigned best_groups_of_memory() const {
    __syncwarp();
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      if (inside(v)) group_scores[layout.id_at(v)] = scores[v];
    }
    __syncwarp();
    return scanned.groups.best([&](int id) { return group_scores[id]; });
  }

  // False if there are more candidates than room, or none is above -inf.
  __device__ bool take_candidates(int begin) const {
    auto& candidates = scanned.storage.candidates;
    float largest = scores[0];
#pragma unroll
    for (int v = 1; v < kPerLane; ++v) largest = fmaxf(largest, scores[v]);
    int key = Order::key(largest), least = 0;
#pragma unroll 4
    for (int j = 0; j < scanned.rounds; ++j) {
      least = subwarp_max<kWarp>(key);
      key = key == least ? Order::kNone : key;
    }
    const float threshold = Order::value(least);
    if (!(threshold > -INFINITY)) return false;  // or NaN: fewer than K different maxima

    float reached = 0;  // a number, which is fewer instructions than a count
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) reached += scores[v] >= threshold ? 1.0f : 0.0f;
    const int own = int(reached);
    const unsigned lower = (1u << scanned.lane) - 1;
    unsigned lanes = __ballot_sync(kFullMask, own & 1);
    int at = __popc(lanes & lower), count = __popc(lanes);  // of the lane's first candidate; of all
    for (int bit = 1; __any_sync(kFullMask, own >> bit); ++bit) {
      lanes = __ballot_sync(kFullMask, own >> bit & 1);
      at += __popc(lanes & lower) << bit;
      count += __popc(lanes) << bit;
    }
    if (count > kMaxCandidates) return false;
    __syncwarp();
    float* score_at = candidates.scores + at;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      if (scores[v] >= threshold) put(score_at++, scores[v], layout.id_at(v), logits[v]);
    }
    if (scanned.lane < kRankedAtOnce) candidates.scores[count + scanned.lane] = -INFINITY;
    __syncwarp();
    if (count > kWarp || !rank_candidates<false>(count, begin)) rank_candidates<true>(count, begin);
    return true;
  }

  // A candidate whose score goes to `at`: no product of an index for each of its numbers.
  __device__ void put(float* at, float score, int id, float logit) const {
    using Candidates = std::remove_reference_t<decltype(scanned.storage.candidates)>;
    at[0] = score;
    at[offsetof(Candidates, logits) / sizeof(float)] = logit;
    reinterpret_cast<int*>(at)[offsetof(Candidates, ids) / sizeof(int)] = id;
  }

  // Moves the best candidates to the winners. Without looking at ids (kTies), which costs more: false where scores tie.
  template <bool kTies>
  __device__ bool rank_candidates(int count, int begin) const {
    const auto& all = scanned.storage.candidates;
    for (int first = 0; first < count; first += kWarp) {
      const int own = min(first + scanned.lane, kMaxCandidates - 1), id = all.ids[own];
      const float score = all.scores[own];
      const bool is_candidate = first + scanned.lane < count;
      float earlier = 0;
#pragma unroll 1
      for (int i = 0; i < count; i += kRankedAtOnce) {
#pragma unroll
        for (int u = 0; u < kRankedAtOnce; ++u) {
          const float other = all.scores[i + u];
          const bool is_before = kTies ? before(other, all.ids[i + u], score, id) : other > score;
          earlier += is_before ? 1.0f : 0.0f;
        }
      }
      const int rank = int(earlier);
      // Each pair of candidates adds one to the sum of all ranks, but for those that tie.
      if (!kTies && __reduce_add_sync(kFullMask, is_candidate ? rank : 0) != count * (count - 1) / 2) return false;
      if (is_candidate && rank < scanned.rounds) {
        scanned.storage.winners.put(rank == scanned.p.top_k ? kWarp : begin + rank, score, id, all.logits[own]);
      }
    }
    __syncwarp();
    return true;
  }
};

}  // namespace moe::cuda
