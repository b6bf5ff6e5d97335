// Select on the CPU: K rounds, each one branch-free pass over a row of keys that finds the place of the best
// key and the best of the rest. Plain loops: the compiler makes vectors of them for each x86-64 level.
#include "select.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "clones.h"
#include "parallel.h"

namespace moe::cpu {
namespace {

constexpr int kBlock = 64;             // bytes: rows are padded to whole vectors
constexpr int64_t kGrain = 1 << 18;    // logits a thread must have before it is worth starting

struct Tally {
  int32_t tokens_per_expert[kMaxExperts] = {};
  int32_t invalid_rows = 0;
};

template <class Format>
MOE_HD void select_rows(const SelectParams& p, int64_t begin, int64_t end, Tally& tally) {
  using Ord = Order<Format>;
  using Key = typename Ord::Key;
  using Real = typename Format::Real;
  constexpr int kLanes = kBlock / int(sizeof(Key));

  alignas(kBlock) Key keys[kMaxExperts];
  const int experts = p.experts, top_k = p.top_k;
  const int padded = (experts + kLanes - 1) & -kLanes;
  for (int e = experts; e < padded; ++e) keys[e] = Ord::kTaken;

  for (int64_t t = begin; t < end; ++t) {
    const Key* row = static_cast<const Key*>(p.logits) + t * p.row_stride;
    int32_t* ids = p.expert_ids + t * top_k;
    Real* weights = static_cast<Real*>(p.weights) + t * top_k;

    Key nans = 0, best = Ord::kTaken;
    for (int e = 0; e < experts; ++e) {
      const Key key = Ord::key(row[e]);
      keys[e] = key;
      best = std::max(best, key);
      nans |= Key(Ord::is_nan(row[e]));
    }

    const Key first = best;
    Key last = best;
    Real sum = 0;
    for (int j = 0; j < top_k; ++j) {
      // The first place of the best key, how many share it, and the best of the others.
      Key id = kMaxExperts, ties = 0, next = Ord::kTaken;
      for (int e = 0; e < padded; ++e) {
        const Key hit = Key(-Key(keys[e] == best));  // all ones or zero
        ties = Key(ties - hit);
        id = std::min(id, Key(Key(e) | Key(~hit & kMaxExperts)));
        next = std::max(next, Key((keys[e] & ~hit) | (Ord::kTaken & hit)));
      }
      keys[id] = Ord::kTaken;
      ids[j] = int32_t(id);
      ++tally.tokens_per_expert[id];
      weights[j] = j == 0 ? Real(1) : std::exp(Ord::value(best) - Ord::value(first));
      sum += weights[j];
      last = best;
      best = ties > 1 ? best : next;
    }

    if (nans || first == Ord::kPlusInf || last == Ord::kMinusInf) {
      std::fill_n(weights, top_k, Real(NAN));
      ++tally.invalid_rows;
    } else {
      for (int j = 0; j < top_k; ++j) weights[j] /= sum;
    }
  }
}

// target_clones wants plain functions, so each format gets one.
MOE_CLONES void rows(Fp64, const SelectParams& p, int64_t begin, int64_t end, Tally& tally) {
  select_rows<Fp64>(p, begin, end, tally);
}
MOE_CLONES void rows(Fp32, const SelectParams& p, int64_t begin, int64_t end, Tally& tally) {
  select_rows<Fp32>(p, begin, end, tally);
}
MOE_CLONES void rows(Fp16, const SelectParams& p, int64_t begin, int64_t end, Tally& tally) {
  select_rows<Fp16>(p, begin, end, tally);
}
MOE_CLONES void rows(Bf16, const SelectParams& p, int64_t begin, int64_t end, Tally& tally) {
  select_rows<Bf16>(p, begin, end, tally);
}

template <class Format>
void backward_rows(const SelectBackwardParams& p) {
  using Bits = typename Format::Bits;
  using Real = typename Format::Real;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const Real* grad = static_cast<const Real*>(p.grad_weights) + t * p.top_k;
    const Real* weights = static_cast<const Real*>(p.weights) + t * p.top_k;
    const int32_t* ids = p.expert_ids + t * p.top_k;
    Bits* out = static_cast<Bits*>(p.grad_logits) + t * p.experts;

    Real dot = 0;
    for (int j = 0; j < p.top_k; ++j) dot += weights[j] * grad[j];
    std::fill_n(out, p.experts, Bits(0));
    for (int j = 0; j < p.top_k; ++j) out[ids[j]] = Format::from_real(weights[j] * (grad[j] - dot));
  }
}

}  // namespace

Status select_forward(const SelectParams& p, Stream) {
  if (const Status status = check_sizes(p); !status.ok()) return status;
  return dispatch(p.dtype, [&](auto format) -> Status {
    std::fill_n(p.tokens_per_expert, p.experts, 0);
    *p.invalid_rows = 0;
    std::mutex merging;
    parallel_for(p.tokens, kGrain / p.experts, p.threads, [&, format](int64_t begin, int64_t end) {
      Tally tally;
      rows(format, p, begin, end, tally);
      const std::lock_guard<std::mutex> lock(merging);
      for (int e = 0; e < p.experts; ++e) p.tokens_per_expert[e] += tally.tokens_per_expert[e];
      *p.invalid_rows += tally.invalid_rows;
    });
    return {};
  });
}

Status select_backward(const SelectBackwardParams& p, Stream) {
  if (const Status status = check_sizes(p); !status.ok()) return status;
  return dispatch(p.dtype, [&](auto format) -> Status {
    backward_rows<decltype(format)>(p);
    return {};
  });
}

}  // namespace moe::cpu
