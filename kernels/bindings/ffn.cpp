#include "ffn.h"

#include <cutlass/version.h>

#include "cuda_backend.h"
#include "grouped_ffn.h"

namespace moe::bindings {
namespace {

FfnShape ffn_shape(int64_t rows, int64_t d_model, int64_t hidden_dim, int experts, int activation, int dtype) {
  return {rows, d_model, hidden_dim, experts, Activation(activation), DType(dtype)};
}

template <class Params>
void run_ffn(Status (*launcher)(const Params&, Stream), const Params& params, int device, uintptr_t stream,
             const char* name) {
  const FfnShape& s = params.shape;
  run<Cuda>(launcher, params, device, stream, name, std::pair("rows", s.rows), std::pair("d_model", s.d_model),
            std::pair("hidden_dim", s.hidden), std::pair("experts", s.experts),
            std::pair("activation", int(s.activation)), std::pair("dtype", int(s.dtype)));
}

void up(uintptr_t rows, uintptr_t up, uintptr_t expert_offsets, uintptr_t weights, uintptr_t slot_of_row,
        uintptr_t hidden, uintptr_t h, int64_t count, int64_t d_model, int64_t hidden_dim, int experts, int activation,
        int dtype, int device, uintptr_t stream) {
  const FfnUpParams params{pointer<void>(rows),
                           pointer<void>(up),
                           pointer<int32_t>(expert_offsets),
                           {pointer<float>(weights), pointer<int32_t>(slot_of_row)},
                           pointer<void>(hidden),
                           pointer<void>(h),
                           ffn_shape(count, d_model, hidden_dim, experts, activation, dtype)};
  run_ffn(cuda::ffn_up, params, device, stream, "ffn_up");
}

void down(uintptr_t h, uintptr_t down, uintptr_t expert_offsets, uintptr_t out, int64_t count, int64_t d_model,
          int64_t hidden_dim, int experts, int activation, int dtype, int device, uintptr_t stream) {
  const FfnDownParams params{pointer<void>(h), pointer<void>(down), pointer<int32_t>(expert_offsets),
                             pointer<void>(out),
                             ffn_shape(count, d_model, hidden_dim, experts, activation, dtype)};
  run_ffn(cuda::ffn_down, params, device, stream, "ffn_down");
}

void down_backward(uintptr_t grad_out, uintptr_t down, uintptr_t hidden, uintptr_t expert_offsets, uintptr_t weights,
                   uintptr_t slot_of_row, uintptr_t grad_hidden, uintptr_t h, uintptr_t grad_weights,
                   uintptr_t workspace, int64_t count, int64_t d_model, int64_t hidden_dim, int experts, int activation,
                   int dtype, int device, uintptr_t stream) {
  const FfnDownBackwardParams params{pointer<void>(grad_out),
                                     pointer<void>(down),
                                     pointer<void>(hidden),
                                     pointer<int32_t>(expert_offsets),
                                     {pointer<float>(weights), pointer<int32_t>(slot_of_row)},
                                     pointer<void>(grad_hidden),
                                     pointer<void>(h),
                                     pointer<float>(grad_weights),
                                     pointer<float>(workspace),
                                     ffn_shape(count, d_model, hidden_dim, experts, activation, dtype)};
  run_ffn(cuda::ffn_down_backward, params, device, stream, "ffn_down_backward");
}

void up_backward(uintptr_t grad_hidden, uintptr_t up, uintptr_t expert_offsets, uintptr_t grad_rows, int64_t count,
                 int64_t d_model, int64_t hidden_dim, int experts, int activation, int dtype, int device,
                 uintptr_t stream) {
  const FfnUpBackwardParams params{pointer<void>(grad_hidden), pointer<void>(up), pointer<int32_t>(expert_offsets),
                                   pointer<void>(grad_rows),
                                   ffn_shape(count, d_model, hidden_dim, experts, activation, dtype)};
  run_ffn(cuda::ffn_up_backward, params, device, stream, "ffn_up_backward");
}

void weight_backward(uintptr_t grad, uintptr_t input, uintptr_t expert_offsets, uintptr_t grad_weight, int64_t count,
                     int64_t outputs, int64_t inputs, int experts, int dtype, int device, uintptr_t stream) {
  const FfnWeightParams params{pointer<void>(grad), pointer<void>(input), pointer<int32_t>(expert_offsets),
                               pointer<void>(grad_weight), count, outputs, inputs, experts, DType(dtype)};
  run<Cuda>(cuda::ffn_weight_backward, params, device, stream, "ffn_weight_backward", std::pair("rows", count),
            std::pair("outputs", outputs), std::pair("inputs", inputs), std::pair("experts", experts),
            std::pair("dtype", dtype));
}

int64_t workspace(int64_t rows, int64_t hidden_dim) {
  return cuda::ffn_workspace(ffn_shape(rows, 0, hidden_dim, 1, 0, int(DType::kBf16)));
}

}  // namespace

void bind_ffn(py::module_& m) {
  m.attr("CUTLASS") = std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) + "." +
                      std::to_string(CUTLASS_PATCH);
  m.def("ffn_up", &up,
        "(rows, up, expert_offsets, weights, slot_of_row, hidden, h, "
        "count, d_model, hidden_dim, experts, activation, dtype, device, stream)");
  m.def("ffn_down", &down,
        "(h, down, expert_offsets, out, count, d_model, hidden_dim, experts, activation, dtype, device, stream)");
  m.def("ffn_down_backward", &down_backward,
        "(grad_out, down, hidden, expert_offsets, weights, slot_of_row, grad_hidden, h, grad_weights, workspace, "
        "count, d_model, hidden_dim, experts, activation, dtype, device, stream)");
  m.def("ffn_up_backward", &up_backward,
        "(grad_hidden, up, expert_offsets, grad_rows, "
        "count, d_model, hidden_dim, experts, activation, dtype, device, stream)");
  m.def("ffn_weight_backward", &weight_backward,
        "(grad, input, expert_offsets, grad_weight, count, outputs, inputs, experts, dtype, device, stream)");
  m.def("ffn_leave_multiprocessors", &cuda::ffn_leave_multiprocessors,
        "(count): from now on the expert kernels leave so many to what runs beside them");
  m.def("ffn_workspace", &workspace, "(rows, hidden_dim) -> fp32 elements of workspace of ffn_down_backward");
}

}  // namespace moe::bindings
