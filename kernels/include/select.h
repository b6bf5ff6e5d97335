// Top-k selection with softmax over the selected logits.
// Shapes: T tokens, E experts, K = top_k. See moe_lightning/ops/select.py for the contract.
#pragma once

#include "dtype.h"
#include "status.h"

namespace moe {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;

struct SelectParams {
  const void* logits;          // (T, E) dtype, columns contiguous
  int64_t row_stride;          // elements from one row of logits to the next; 0 and more
  void* weights;               // (T, K) fp32; fp64 for fp64 logits
  int32_t* expert_ids;         // (T, K)
  int32_t* tokens_per_expert;  // (E)
  int32_t* invalid_rows;       // scalar
  int64_t tokens;
  int experts;
  int top_k;
  DType dtype;
  int threads;                 // CPU only: at most this many
};

// grad_logits[t, id_j] = w_j (g_j - sum_i w_i g_i), and 0 where an expert was not selected.
struct SelectBackwardParams {
  const void* grad_weights;    // (T, K), the type of weights
  const void* weights;         // (T, K)
  const int32_t* expert_ids;   // (T, K)
  void* grad_logits;           // (T, E) dtype, contiguous
  int64_t tokens;
  int experts;
  int top_k;
  DType dtype;
};

template <class Params>
Status check_sizes(const Params& p) {
  if (p.experts < 1 || p.experts > kMaxExperts) return {Code::kExperts};
  if (p.top_k < 1 || p.top_k > p.experts || p.top_k > kMaxTopK) return {Code::kTopK};
  return {};
}

// Calls run(Format{}) for the format that dtype names.
template <class Run>
Status dispatch(DType dtype, Run&& run) {
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
