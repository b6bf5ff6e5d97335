// Top-k selection with the weights of the winners, and its gradient.
// Shapes: T tokens, E experts, K = top_k. See moe_lightning/ops/select.py for the contract.
#pragma once

#include <cmath>

#include "dtype.h"
#include "status.h"

namespace moe {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;

// What a logit is turned into before it becomes a weight.
enum class Score : int { kSoftmax = 0, kSigmoid = 1 };

struct SelectParams {
  const void* logits;          // (T, E) dtype, columns contiguous
  int64_t row_stride;          // elements from one row of logits to the next; 0 and more
  const float* bias;           // (E) added to what orders the experts, not to what becomes a weight; or null
  const float* selection_scores;  // (T, E) that order the experts in place of the logits; or null. Not both
  void* weights;               // (T, K) fp32; fp64 for fp64 logits
  int32_t* expert_ids;         // (T, K)
  int32_t* tokens_per_expert;  // (E)
  int32_t* invalid_rows;       // scalar
  int64_t tokens;
  int experts;
  int top_k;
  DType dtype;
  Score score;
  bool renormalize;            // weights of a row sum to 1
  int threads;                 // CPU only: at most this many
};

// With w_j the weights, g_j their gradients, and the sums over the K selected:
//   softmax, renormalised   dl_j = w_j (g_j - sum_i w_i g_i)                       0 elsewhere
//   softmax over all        dl_e = p_e ([e selected] g_e - sum_i w_i g_i)          p the softmax of the row
//   sigmoid, renormalised   dl_j = (1 - s_j) w_j (g_j - sum_i w_i g_i)             s the sigmoid
//   sigmoid                 dl_j = (1 - s_j) w_j g_j
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
};

// What orders the experts in place of a finite logit. A mask stays one, and NaN and +inf show.
template <class Real>
MOE_HD Real selection_score(const SelectParams& p, int64_t t, int expert, Real logit) {
  if (!(logit - logit == 0)) return logit;
  if (p.selection_scores != nullptr) return Real(p.selection_scores[t * p.experts + expert]);
  if (p.bias == nullptr) return logit;
  return (p.score == Score::kSigmoid ? Real(1) / (Real(1) + exp(-logit)) : logit) + Real(p.bias[expert]);
}

template <class Params>
Status check_sizes(const Params& p) {
  if (p.experts < 1 || p.experts > kMaxExperts) return {Code::kExperts};
  if (p.top_k < 1 || p.top_k > p.experts || p.top_k > kMaxTopK) return {Code::kTopK};
  if (p.score != Score::kSoftmax && p.score != Score::kSigmoid) return {Code::kScore};
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
