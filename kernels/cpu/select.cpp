// Select on the CPU: K rounds, each one branch-free pass over a row of keys that finds the index of the best key and the
// best of the rest. Plain loops: the compiler vectorises them for each x86-64 level.
#include "select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "parallel.h"

// Compiles a function once for each x86-64 level and lets the loader choose.
#if defined(MOE_HAS_TARGET_CLONES)
#define MOE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MOE_CLONES
#endif

namespace moe::cpu {
namespace {

constexpr int kBlock = 64;             // bytes: rows are padded to whole vectors
constexpr int64_t kGrain = 1 << 18;    // logits a thread must have before it is worth starting

struct Counts {
  int32_t tokens_per_expert[kMaxExperts] = {};
  int32_t invalid_rows = 0;
  std::vector<int32_t> gaps;  // (kGapBins, E), or empty
};

// The softmax over a row is exp(logit - this).
template <class Format>
MOE_HD typename Format::Real log_sum_exp(const typename Format::Bits* row, int experts) {
  using Real = typename Format::Real;
  Real largest = -INFINITY, sum = 0;
  for (int e = 0; e < experts; ++e) largest = std::max(largest, Format::to_real(row[e]));
  for (int e = 0; e < experts; ++e) sum += std::exp(Format::to_real(row[e]) - largest);
  return largest + std::log(sum);
}

// Makes the finite keys of all but the best groups -inf: those whose two best experts have the highest sums.
template <class Ord>
void keep_best_groups(const SelectParams& p, typename Ord::Key* keys) {
  using Real = decltype(Ord::value(0));
  const int size = p.experts / p.n_group;
  Real sums[kMaxGroups];
  for (int g = 0; g < p.n_group; ++g) {
    Real first = -INFINITY, second = -INFINITY;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      const Real score = Ord::value(keys[e]);
      second = std::max(second, std::min(first, score));
      first = std::max(first, score);
    }
    sums[g] = size == 1 ? first : first + second;
    if (std::isnan(sums[g])) sums[g] = -INFINITY;
  }
  for (int g = 0; g < p.n_group; ++g) {
    int better = 0;
    for (int i = 0; i < p.n_group; ++i) better += sums[i] > sums[g] || (sums[i] == sums[g] && i < g);
    if (better < p.topk_group) continue;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      if (keys[e] != Ord::kPlusInf) keys[e] = Ord::kMinusInf;
    }
  }
}

// Sorts by keys of KeyFormat: that of the logits, or, where other scores order the experts (kIndirect), of the arithmetic.
template <class Format, class KeyFormat, bool kIndirect>
MOE_HD void select_rows(const SelectParams& p, int64_t begin, int64_t end, Counts& counts) {
  using Bits = typename Format::Bits;
  using Ord = Order<KeyFormat>;
  using Key = typename Ord::Key;
  using Real = typename Format::Real;
  constexpr int kLanes = kBlock / int(sizeof(Key));

  alignas(kBlock) Key keys[kMaxExperts];
  const int experts = p.experts, top_k = p.top_k;
  const int padded = (experts + kLanes - 1) & -kLanes;
  for (int e = experts; e < padded; ++e) keys[e] = Ord::kTaken;

  for (int64_t t = begin; t < end; ++t) {
    const Bits* row = static_cast<const Bits*>(p.logits) + t * p.row_stride;
    int32_t* ids = p.expert_ids + t * top_k;
    Real* weights = static_cast<Real*>(p.weights) + t * top_k;
    const int32_t counted = p.mask == nullptr || p.mask[t];
    const Real all_log_sum = needs_log_sum(p) ? log_sum_exp<Format>(row, experts) : Real(0);

    Key nans = 0, best = Ord::kTaken;
    for (int e = 0; e < experts; ++e) {
      Key bits;
      if constexpr (kIndirect) bits = KeyFormat::from_real(ranking_score(p, t, e, Format::to_real(row[e]), all_log_sum));
      else bits = row[e];
      const Key key = Ord::key(bits);
      keys[e] = key;
      best = std::max(best, key);
      nans |= Key(Ord::is_nan(bits));
    }

    const bool has_inf = best == Ord::kPlusInf;
    if (p.topk_group < p.n_group) {
      keep_best_groups<Ord>(p, keys);
      best = *std::max_element(keys, keys + experts);
    }
    Key last = best;
    for (int j = 0; j < top_k; ++j) {
      // The first index of the best key, how many share it, and the best of the others.
      Key id = kMaxExperts, ties = 0, next = Ord::kTaken;
      for (int e = 0; e < padded; ++e) {
        const Key hit = Key(-Key(keys[e] == best));  // all ones or zero
        ties = Key(ties - hit);
        id = std::min(id, Key(Key(e) | Key(~hit & kMaxExperts)));
        next = std::max(next, Key((keys[e] & ~hit) | (Ord::kTaken & hit)));
      }
      keys[id] = Ord::kTaken;
      ids[j] = int32_t(id);
      counts.tokens_per_expert[id] += counted;
      weights[j] = Format::to_real(row[id]);  // the logit, for now
      last = best;
      best = ties > 1 ? best : next;
    }

    if (nans || has_inf || last == Ord::kMinusInf) {
      std::fill_n(weights, top_k, Real(NAN));
      counts.invalid_rows += counted;
      continue;
    }
    const bool relative = p.score == Score::kSoftmax && p.renormalize;
    const Real log_sum = relative ? *std::max_element(weights, weights + top_k) : all_log_sum;
    Real sum = 0;
    for (int j = 0; j < top_k; ++j) {
      weights[j] = score_of(p.score, weights[j], log_sum);
      sum += weights[j];
    }
    sum = p.renormalize ? std::max(sum, std::numeric_limits<Real>::min()) : Real(1);
    for (int j = 0; j < top_k; ++j) weights[j] = weights[j] / sum * Real(p.scaling_factor);

    if (counts.gaps.empty() || !counted) continue;
    const Real cutoff = Ord::value(best);  // of those not selected
    for (int e = 0; e < experts; ++e) {
      const Real score = ranking_score(p, t, e, Format::to_real(row[e]), all_log_sum);
      ++counts.gaps[gap_bin(float(cutoff - score)) * experts + e];
    }
  }
}

// target_clones wants plain functions, so each format gets two.
#define MOE_ROWS(Format, KeyFormat)                                                                      \
  MOE_CLONES void direct_rows(Format, const SelectParams& p, int64_t begin, int64_t end, Counts& counts) {   \
    select_rows<Format, Format, false>(p, begin, end, counts);                                             \
  }                                                                                                       \
  MOE_CLONES void indirect_rows(Format, const SelectParams& p, int64_t begin, int64_t end, Counts& counts) { \
    select_rows<Format, KeyFormat, true>(p, begin, end, counts);                                          \
  }
MOE_ROWS(Fp64, Fp64)
MOE_ROWS(Fp32, Fp32)
MOE_ROWS(Fp16, Fp32)
MOE_ROWS(Bf16, Fp32)
#undef MOE_ROWS

template <class Format>
void backward_rows(const SelectBackwardParams& p) {
  using Bits = typename Format::Bits;
  using Real = typename Format::Real;
  const bool dense = p.score == Score::kSoftmax && !p.renormalize;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const Real* grad = static_cast<const Real*>(p.grad_weights) + t * p.top_k;
    const Real* weights = static_cast<const Real*>(p.weights) + t * p.top_k;
    const int32_t* ids = p.expert_ids + t * p.top_k;
    const Bits* row = static_cast<const Bits*>(p.logits) + t * p.row_stride;
    Bits* out = static_cast<Bits*>(p.grad_logits) + t * p.experts;

    Real dot = 0;
    for (int j = 0; j < p.top_k; ++j) dot += weights[j] * grad[j];
    const Real mean = dot / Real(p.scaling_factor);  // of the gradients, by the weights before scaling
    if (dense) {
      const Real log_sum = log_sum_exp<Format>(row, p.experts);
      for (int e = 0; e < p.experts; ++e) {
        out[e] = Format::from_real(-dot * std::exp(Format::to_real(row[e]) - log_sum));
      }
    } else {
      std::fill_n(out, p.experts, Bits(0));
    }
    for (int j = 0; j < p.top_k; ++j) {
      const bool alone = p.score != Score::kSoftmax && !p.renormalize;  // no weight depends on another logit
      Real slope = weights[j];
      if (p.score != Score::kSoftmax) slope *= log_derivative(p.score, Format::to_real(row[ids[j]]));
      out[ids[j]] = Format::from_real(slope * (alone ? grad[j] : grad[j] - mean));
    }
  }
}

}  // namespace

Status select_forward(const SelectParams& p, Stream) {
  if (const Status status = check_sizes(p); !status.ok()) return status;
  if (const Status status = check_groups(p); !status.ok()) return status;
  return dispatch_dtype(p.dtype, [&](auto format) -> Status {
    std::fill_n(p.tokens_per_expert, p.experts, 0);
    *p.invalid_rows = 0;
    std::mutex merging;
    parallel_for(p.tokens, kGrain / p.experts, p.threads, [&, format](int64_t begin, int64_t end) {
      Counts counts;
      if (p.gap_counts != nullptr) counts.gaps.resize(size_t(kGapBins) * p.experts);
      if (p.selection_scores == nullptr && !ranks_by_score(p)) direct_rows(format, p, begin, end, counts);
      else indirect_rows(format, p, begin, end, counts);
      const std::lock_guard<std::mutex> lock(merging);
      for (int e = 0; e < p.experts; ++e) p.tokens_per_expert[e] += counts.tokens_per_expert[e];
      *p.invalid_rows += counts.invalid_rows;
      for (size_t i = 0; i < counts.gaps.size(); ++i) p.gap_counts[i] += float(counts.gaps[i]);
    });
    return {};
  });
}

Status select_backward(const SelectBackwardParams& p, Stream) {
  if (const Status status = check_sizes(p); !status.ok()) return status;
  return dispatch_dtype(p.dtype, [&](auto format) -> Status {
    backward_rows<decltype(format)>(p);
    return {};
  });
}

}  // namespace moe::cpu
