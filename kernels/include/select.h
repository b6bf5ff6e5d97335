// Top-k selection with the weights of the winners, and its gradient.
// Shapes: T tokens, E experts, K = top_k. See moe_lightning/ops/select.py for the contract.
#pragma once

#include <cmath>

#include "dtype.h"
#include "status.h"

namespace moe {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;

constexpr int kMaxGroups = 32;

// What a logit is turned into before it becomes a weight.
enum class Score : int { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2 };

struct SelectParams {
  const void* logits;          // (T, E) dtype, columns contiguous
  int64_t row_stride;          // elements from one row of logits to the next; 0 and more
  const float* bias;           // (E) added to the scores that order the experts, not to the weights; or null
  const float* selection_scores;  // (T, E) that order the experts in place of the logits; or null. Not both
  const bool* mask;            // (T) false for padding, which is in no count; or null
  void* weights;               // (T, K) fp32; fp64 for fp64 logits
  int32_t* expert_ids;         // (T, K)
  int32_t* tokens_per_expert;  // (E)
  int32_t* invalid_rows;       // scalar
  float* gap_counts;           // (kGapBins, E), added to: tokens by the gap of each expert, see gap_bin; or null
  int64_t tokens;
  int experts;
  int top_k;
  int n_group;                 // groups of neighbouring experts, of equal size
  int topk_group;              // of which a token's experts come from so many; n_group: from all
  DType dtype;
  Score score;
  bool renormalize;            // weights of a row sum to 1, before scaling_factor
  double scaling_factor;
  int threads;                 // CPU only: at most this many
};

// With w_j the weights, g_j their gradients, c the scaling factor, d = sum_i w_i g_i over the K selected, and r_j the
// derivative of the logarithm of the score:
//   softmax, renormalised   dl_j = w_j (g_j - d / c)                       0 elsewhere
//   softmax over all        dl_e = [e selected] w_e g_e - p_e d            p the softmax of the row
//   others, renormalised    dl_j = r_j w_j (g_j - d / c)
//   others                  dl_j = r_j w_j g_j
struct SelectBackwardParams {
  const void* logits;          // (T, E) dtype, columns contiguous; read unless softmax, renormalised
  int64_t row_stride;
  const void* grad_weights;    // (T, K), the type of weights
  const void* weights;         // (T, K)
  const int32_t* expert_ids;   // (T, K)
  void* grad_logits;           // (T, E) dtype, contiguous
  int64_t tokens;
  int experts;
  int top_k;
  DType dtype;
  Score score;
  bool renormalize;
  double scaling_factor;
};

// ---- scores ------------------------------------------------------------------------------------------------------

// Below, softplus is the exponential function, in fp32.
constexpr float kSoftplusIsExp = -17;

template <class Real>
MOE_HD Real sigmoid(Real x) {
  using std::exp;
  return Real(1) / (Real(1) + exp(-x));
}

template <class Real>
MOE_HD Real softplus(Real x) {
  using std::exp, std::log1p;
  return (x > 0 ? x : Real(0)) + log1p(exp(x > 0 ? -x : x));
}

// Of a logit; softmax: whose row has this logarithm of the sum of exponentials.
template <class Real>
MOE_HD Real score_of(Score score, Real logit, Real log_sum) {
  using std::exp, std::sqrt;
  if (score == Score::kSigmoid) return sigmoid(logit);
  if (score == Score::kSoftmax) return exp(logit - log_sum);
  return logit < Real(kSoftplusIsExp) ? exp(logit / 2) : sqrt(softplus(logit));
}

// The derivative of the logarithm of a sigmoid, or of the root of a softplus.
template <class Real>
MOE_HD Real log_derivative(Score score, Real logit) {
  if (score == Score::kSigmoid) return sigmoid(-logit);
  return logit < Real(kSoftplusIsExp) ? Real(0.5) : sigmoid(logit) / 2 / softplus(logit);
}

// Whether experts are ordered by their scores: else by the logits, which order them alike.
MOE_HD bool ranks_by_score(const SelectParams& p) {
  return p.selection_scores == nullptr && (p.bias != nullptr || p.topk_group < p.n_group || p.gap_counts != nullptr);
}

// Whether the softmax over all experts is needed.
MOE_HD bool needs_log_sum(const SelectParams& p) {
  return p.score == Score::kSoftmax && (!p.renormalize || ranks_by_score(p));
}

// What orders the experts. A mask of -inf stays one, and NaN and +inf show.
template <class Real>
MOE_HD Real ranking_score(const SelectParams& p, int64_t t, int expert, Real logit, Real log_sum) {
  if (!(logit - logit == 0)) return logit;
  if (p.selection_scores != nullptr) return Real(p.selection_scores[t * p.experts + expert]);
  if (!ranks_by_score(p)) return logit;
  return score_of(p.score, logit, log_sum) + (p.bias == nullptr ? Real(0) : Real(p.bias[expert]));
}

// ---- gaps: how far a ranking score is below the (K + 1)-th best of its row -----------------------------------------

// Bins of the gap, kGapBins / 2 on either side of 0, four to each doubling of |gap| + kGapOffset.
constexpr int kGapBins = 64;
constexpr float kGapOffset = 0x1p-7f;
constexpr int kGapShift = 21;

// Bins between the gap's and 0.
MOE_HD int gap_distance(float gap) {
  const int32_t first = bit_cast<int32_t>(kGapOffset);
  const int32_t distance = (bit_cast<int32_t>((gap < 0 ? -gap : gap) + kGapOffset) - first) >> kGapShift;
  return distance < kGapBins / 2 ? distance : kGapBins / 2 - 1;
}

MOE_HD int gap_bin(float gap) {
  return kGapBins / 2 + (gap < 0 ? -1 - gap_distance(gap) : gap_distance(gap));
}

template <class Params>
Status check_sizes(const Params& p) {
  if (p.experts < 1 || p.experts > kMaxExperts) return {Code::kExperts};
  if (p.top_k < 1 || p.top_k > p.experts || p.top_k > kMaxTopK) return {Code::kTopK};
  if (p.score != Score::kSoftmax && p.score != Score::kSigmoid && p.score != Score::kSqrtSoftplus) return {Code::kScore};
  return {};
}

inline Status check_groups(const SelectParams& p) {
  const bool whole = p.n_group >= 1 && p.n_group <= kMaxGroups && p.experts % p.n_group == 0;
  if (!whole || p.topk_group < 1 || p.topk_group > p.n_group) return {Code::kGroups};
  if (p.topk_group * (p.experts / p.n_group) < p.top_k) return {Code::kGroups};
  if (p.gap_counts != nullptr && (p.top_k == p.experts || p.topk_group < p.n_group)) return {Code::kGaps};
  return {};
}

// Calls run(Format{}) for the format that dtype names.
template <class Run>
Status dispatch_dtype(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFp64: return run(Fp64{});
    case DType::kFp32: return run(Fp32{});
    case DType::kFp16: return run(Fp16{});
    case DType::kBf16: return run(Bf16{});
  }
  return {Code::kDtype};
}

namespace cpu {
Status select_forward(const SelectParams& params, Stream stream);
Status select_backward(const SelectBackwardParams& params, Stream stream);
}  // namespace cpu

namespace cuda {
Status select_forward(const SelectParams& params, Stream stream);
Status select_backward(const SelectBackwardParams& params, Stream stream);
}  // namespace cuda

}  // namespace moe
