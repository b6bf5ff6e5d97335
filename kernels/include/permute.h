// Local movement of rows: into expert order, and back as a weighted sum, with the gradients of both.
// Shapes: T tokens, D width, K = top_k, N = T * K rows; inverse_perm (N) takes slot t * K + k to its row.
// Rows from *kept_rows on belong to dropped slots: they give exactly 0, and are not read.
// All are indexed by token, so a token's own row is moved once, and every sum has one order.
#pragma once

#include "select.h"
#include "status.h"

namespace moe {

struct RowShape {
  int64_t tokens;
  int64_t width;
  int top_k;
  DType dtype;  // of rows and tokens; weights and their gradients are fp32, fp64 for fp64 rows
};

struct PermuteParams {  // rows[inverse_perm[t K + k]] = x[t]
  const void* x;
  const void* second_x;  // tokens from first_tokens on
  int64_t first_tokens;
  const int32_t* inverse_perm;
  void* rows;
  RowShape shape;
};

struct SplitRowsParams {  // undoes a permute of two sources: row r of first, then second = rows[inverse_perm[r]]
  const void* rows;
  const int32_t* inverse_perm;
  void* first;
  void* second;  // rows from first_rows on
  int64_t first_rows;
  RowShape shape;  // tokens: rows of both; top_k 1
};

struct UnpermuteParams {  // y[t] = sum_k weights[t, k] rows[inverse_perm[t K + k]]
  const void* rows;
  const void* weights;  // (T, K), or null: all are one, the gradient of permute
  const int32_t* inverse_perm;
  const int32_t* kept_rows;  // scalar, or null: nothing was dropped
  void* y;
  RowShape shape;
};

struct UnpermuteBackwardParams {  // grad_rows[r] = weights[t, k] grad_y[t], grad_weights[t, k] = <grad_y[t], rows[r]>
  const void* grad_y;
  const void* rows;
  const void* weights;
  const int32_t* inverse_perm;
  const int32_t* kept_rows;
  void* grad_rows;
  void* grad_weights;
  RowShape shape;
};

inline Status check_sizes(const RowShape& s) {
  if (s.top_k < 1) return {Code::kTopK};
  if (s.tokens < 0 || s.tokens > INT32_MAX / s.top_k) return {Code::kSlots};
  if (s.width < 0) return {Code::kWidth};
  return {};
}

namespace cuda {
Status permute(const PermuteParams& params, Stream stream);
Status split_rows(const SplitRowsParams& params, Stream stream);
Status unpermute(const UnpermuteParams& params, Stream stream);
Status unpermute_backward(const UnpermuteBackwardParams& params, Stream stream);
}  // namespace cuda

}  // namespace moe
