// The experts' feed-forward network on sm_90a: which kernel runs.
#include "grouped_ffn.h"

#include "ffn_down_backward.cuh"

namespace moe::cuda {
namespace {

using ffn::Variant;

using Single = Variant<1, 4, 2>;
using SingleInPlace = Variant<1, 3, 5>;  // slots hold what comes in as well

// Calls run(Format{}) for the two formats that the tensor cores take here.
template <class Run>
Status dispatch16(DType dtype, const Run& run) {
  if (dtype == DType::kBf16) return run(Bf16{});
  if (dtype == DType::kFp16) return run(Fp16{});
  return {Code::kDtype16};
}

Status check(const FfnShape& s) { return ffn::check_shape(s.rows, s.d_model, s.hidden, s.experts, s.dtype); }

}  // namespace

Status ffn_up(const FfnUpParams& p, Stream stream) {
  if (const Status status = check(p.shape); !status.ok()) return status;
  if (p.shape.rows == 0) return {};
  return dispatch16(p.shape.dtype, [&](auto format) -> Status {
    using Format = decltype(format);
    switch (p.shape.activation) {
      case Activation::kSwiglu: return ffn::up<Format, Swiglu, Single>(p, stream);
      case Activation::kGelu: return ffn::up<Format, Gelu, Single>(p, stream);
    }
    return {Code::kActivation};
  });
}

Status ffn_down(const FfnDownParams& p, Stream stream) {
  if (const Status status = check(p.shape); !status.ok()) return status;
  if (p.shape.rows == 0) return {};
  const ffn::RowProduct product{p.h,         p.down,           p.expert_offsets, p.out,        p.shape.rows,
                                p.shape.d_model, p.shape.hidden, p.shape.experts,  p.shape.dtype};
  return dispatch16(p.shape.dtype, [&](auto format) {
    return ffn::rows_by_weights<decltype(format), Major::K, Single>(product, stream);
  });
}

int64_t ffn_workspace(const FfnShape& s) { return ceil_div<int64_t>(s.hidden, ffn::kTileN) * s.rows; }

Status ffn_down_backward(const FfnDownBackwardParams& p, Stream stream) {
  if (const Status status = check(p.shape); !status.ok()) return status;
  if (p.shape.rows == 0) return {};
  return dispatch16(p.shape.dtype, [&](auto format) -> Status {
    using Format = decltype(format);
    switch (p.shape.activation) {
      case Activation::kSwiglu: return ffn::down_backward<Format, Swiglu, SingleInPlace>(p, stream);
      case Activation::kGelu: return ffn::down_backward<Format, Gelu, SingleInPlace>(p, stream);
    }
    return {Code::kActivation};
  });
}

Status ffn_up_backward(const FfnUpBackwardParams& p, Stream stream) {
  if (const Status status = check(p.shape); !status.ok()) return status;
  if (p.shape.rows == 0) return {};
  const ffn::RowProduct product{p.grad_hidden,   p.up,                p.expert_offsets, p.grad_rows,  p.shape.rows,
                                p.shape.d_model, ffn_width(p.shape), p.shape.experts,  p.shape.dtype};
  return dispatch16(p.shape.dtype, [&](auto format) {
    return ffn::rows_by_weights<decltype(format), Major::MN, Single>(product, stream);
  });
}

Status ffn_weight_backward(const FfnWeightParams& p, Stream stream) {
  if (const Status status = ffn::check_shape(p.rows, p.outputs, p.inputs, p.experts, p.dtype); !status.ok()) {
    return status;
  }
  return dispatch16(p.dtype, [&](auto format) { return ffn::weight_gradient<decltype(format), Single>(p, stream); });
}

}  // namespace moe::cuda
