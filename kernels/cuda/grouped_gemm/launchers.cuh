// The feed-forward launchers of each architecture, and what they share. Arguments are those of grouped_ffn.h, checked; at
// least one row, except for weight gradients. Call them only where available() holds.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "grouped_ffn.h"
#include "grouped_gemm/activation.cuh"

namespace moe::cuda::ffn {

struct Launchers {
  bool (*available)();
  int64_t (*workspace)(int64_t num_rows, int64_t hidden_dim);
  Status (*up)(const FfnUpParams& params, Stream stream);
  Status (*down)(const FfnDownParams& params, Stream stream);
  Status (*down_backward)(const FfnDownBackwardParams& params, Stream stream);
  Status (*up_backward)(const FfnUpBackwardParams& params, Stream stream);
  Status (*weight_backward)(const FfnWeightParams& params, Stream stream);
};
extern const Launchers sm80_launchers;  // mma.sync and cp.async: compute capability 8.0 and newer
extern const Launchers sm90_launchers;  // wgmma and TMA: 9.0 alone, built for 90a

// grad_weights[slot_of_row[r]] = the sum of partials[n][r] over n, in order; 0 for rows of dropped slots.
struct ReducePartialsParams {
  const float* partials;     // (parts, N)
  const int32_t* kept_rows;  // scalar
  const int32_t* slot_of_row;
  float* grad_weights;
  int rows, parts;
};
Status reduce_partials(const ReducePartialsParams& params, Stream stream);

// out (N, outputs) = rows (N, inputs) x weights. Weights are (E, outputs, inputs), or (E, inputs, outputs) for MN.
struct RowsGemm {
  const void* rows;
  const void* weights;
  const int32_t* offsets;
  void* out;
  int64_t outputs, inputs;
  const FfnShape& shape;
};
inline RowsGemm down_gemm(const FfnDownParams& p) {
  return {p.h, p.down, p.expert_offsets, p.out, p.shape.d_model, p.shape.hidden_dim, p.shape};
}
inline RowsGemm up_backward_gemm(const FfnUpBackwardParams& p) {
  return {p.grad_hidden, p.up, p.expert_offsets, p.grad_rows, p.shape.d_model, ffn_width(p.shape), p.shape};
}

// Of `active` blocks or clusters, those that leave sm_margin multiprocessors free; at least one.
inline int64_t within_sm_margin(int64_t active, int sm_margin) {
  const int sms = num_sms();
  return active < 1 ? 0 : std::max<int64_t>(active * std::max(sms - sm_margin, 0) / sms, 1);
}

// Calls run(Format{}) for the two formats that the tensor cores take here.
template <class Run>
Status dispatch16(DType dtype, const Run& run) {
  if (dtype == DType::kBf16) return run(Bf16{});
  if (dtype == DType::kFp16) return run(Fp16{});
  return {Code::kDtype16};
}

// Calls run(Format{}, Act{}).
template <class Run>
Status dispatch16(const FfnShape& s, const Run& run) {
  return dispatch16(s.dtype, [&](auto format) -> Status {
    switch (s.activation) {
      case Activation::kSwiglu: return run(format, Swiglu{});
      case Activation::kGelu: return run(format, Gelu{});
    }
    return {Code::kActivation};
  });
}

}  // namespace moe::cuda::ffn
