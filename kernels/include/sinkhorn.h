// Sinkhorn balancing of router scores. See moe_lightning/ops/sinkhorn.py for the method and its contract.
// Shapes: T tokens, E experts.
#pragma once

#include "select.h"
#include "status.h"

namespace moe {

struct SinkhornParams {
  const void* logits;   // (T, E) dtype, columns contiguous
  int64_t row_stride;
  float* scores;        // (T, E), balanced, in the log domain
  float* workspace;     // sinkhorn_workspace(E) floats
  int64_t tokens;
  int experts;
  DType dtype;
  int iterations;
  float temperature;
  float tolerance;      // stop when no expert is further from its target than this fraction; 0: never
};

inline Status check_sizes(const SinkhornParams& p) {
  if (p.experts < 1 || p.experts > kMaxExperts) return {Code::kExperts};
  if (p.iterations < 1) return {Code::kIterations};
  return {};
}

namespace cuda {
int64_t sinkhorn_workspace(int experts);  // floats
Status sinkhorn(const SinkhornParams& params, Stream stream);
}  // namespace cuda

}  // namespace moe
