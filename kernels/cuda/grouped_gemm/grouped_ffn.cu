// The experts' feed-forward network: checks, and the one place that chooses the architecture by device and build.
#include "grouped_gemm/launchers.cuh"

namespace moe::cuda {
namespace ffn {
namespace {

constexpr int kReduceThreads = 128;

// One thread per row.
__global__ void __launch_bounds__(kReduceThreads) reduce_partials_kernel(const ReducePartialsParams p) {
  launch_dependent_grids();
  wait_on_dependent_grids();
  const int row = blockIdx.x * kReduceThreads + threadIdx.x;
  if (row >= p.rows) return;
  float sum = 0.0f;
  if (row < *p.kept_rows) {
#pragma unroll 8
    for (int n = 0; n < p.parts; ++n) sum += p.partials[int64_t(n) * p.rows + row];
  }
  p.grad_weights[p.slot_of_row[row]] = sum;
}

}  // namespace

Status reduce_partials(const ReducePartialsParams& p, Stream stream) {
  if (p.rows == 0) return {};
  launch_pdl(reduce_partials_kernel, unsigned(ceil_div(p.rows, kReduceThreads)), kReduceThreads, 0, stream, p);
  return last_error();
}

}  // namespace ffn

namespace {

constexpr int kMostRowsOfCluster = 384;  // tiles may end beyond the last row

Status check(int64_t rows, int64_t outputs, int64_t inputs, int experts, DType dtype, int sm_margin) {
  if (dtype != DType::kFp16 && dtype != DType::kBf16) return {Code::kDtype16};
  if (experts < 1 || experts > kMaxExperts) return {Code::kExperts};
  if (rows < 0 || rows > INT32_MAX - 2 * kMostRowsOfCluster) return {Code::kSlots};
  if (outputs < 8 || inputs < 8 || outputs % 8 != 0 || inputs % 8 != 0) return {Code::kAligned};
  if (outputs > INT32_MAX / 4 || inputs > INT32_MAX / 4) return {Code::kWidth};
  if (sm_margin < 0) return {Code::kSmMargin};
  return {};
}

Status check(const FfnShape& s) {
  if (s.activation != Activation::kSwiglu && s.activation != Activation::kGelu) return {Code::kActivation};
  return check(s.num_rows, s.d_model, s.hidden_dim, s.experts, s.dtype, s.sm_margin);
}

template <class Params>
using Launcher = Status (*ffn::Launchers::*)(const Params&, Stream);

template <class Params>
Status run_on_architecture(const Params& params, Stream stream, Launcher<Params> launcher) {
  for (const ffn::Launchers* arch : {&ffn::sm90_launchers, &ffn::sm80_launchers}) {
    if (arch->available()) return (arch->*launcher)(params, stream);
  }
  return {Code::kArchitecture};
}

template <class Params>
Status run(const Params& params, Stream stream, Launcher<Params> launcher) {
  if (const Status status = check(params.shape); !status.ok() || params.shape.num_rows == 0) return status;
  return run_on_architecture(params, stream, launcher);
}

}  // namespace

// Enough for either, so that it does not depend on the device.
int64_t ffn_workspace(int64_t num_rows, int64_t hidden_dim) {
  return std::max(ffn::sm90_launchers.workspace(num_rows, hidden_dim), ffn::sm80_launchers.workspace(num_rows, hidden_dim));
}

Status ffn_up(const FfnUpParams& p, Stream stream) { return run(p, stream, &ffn::Launchers::up); }
Status ffn_down(const FfnDownParams& p, Stream stream) { return run(p, stream, &ffn::Launchers::down); }
Status ffn_down_backward(const FfnDownBackwardParams& p, Stream stream) {
  return run(p, stream, &ffn::Launchers::down_backward);
}
Status ffn_up_backward(const FfnUpBackwardParams& p, Stream stream) { return run(p, stream, &ffn::Launchers::up_backward); }

Status ffn_weight_backward(const FfnWeightParams& p, Stream stream) {
  const Status status = check(p.num_rows, p.outputs, p.inputs, p.experts, p.dtype, p.sm_margin);
  if (p.accumulate && !p.fp32) return {Code::kAccumulate};
  return status.ok() ? run_on_architecture(p, stream, &ffn::Launchers::weight_backward) : status;
}

}  // namespace moe::cuda
