// The module moe_lightning._cuda. It imports without a driver and without a GPU; device_count() then says
// why nothing can run.
#include "counts.h"
#include "cuda_backend.h"
#include "ffn.h"
#include "permute.h"
#include "sinkhorn.h"
#include "symmetric.h"

namespace {

// ---- kernels that only a GPU has: on the CPU torch's own are as fast ------------------------------------------
using moe::bindings::Cuda;
using moe::bindings::pointer;

moe::RowShape row_shape(int64_t tokens, int64_t width, int top_k, int dtype) {
  return {tokens, width, top_k, moe::DType(dtype)};
}

template <class Params>
void move_rows(moe::Status (*launcher)(const Params&, moe::Stream), const Params& params, int device,
               uintptr_t stream, const char* name) {
  const moe::RowShape& s = params.shape;
  moe::bindings::run<Cuda>(launcher, params, device, stream, name, std::pair("tokens", s.tokens),
                           std::pair("width", s.width), std::pair("top_k", s.top_k),
                           std::pair("dtype", int(s.dtype)));
}

void permute(uintptr_t x, uintptr_t inverse_perm, uintptr_t rows, int64_t tokens, int64_t width, int top_k,
             int dtype, int device, uintptr_t stream) {
  const moe::PermuteParams params{pointer<void>(x),    nullptr, tokens, pointer<int32_t>(inverse_perm),
                                  pointer<void>(rows), row_shape(tokens, width, top_k, dtype)};
  move_rows(moe::cuda::permute, params, device, stream, "permute");
}

void join(uintptr_t first, uintptr_t second, int64_t first_rows, uintptr_t places, uintptr_t rows, int64_t count,
          int64_t width, int dtype, int device, uintptr_t stream) {
  const moe::PermuteParams params{pointer<void>(first),    pointer<void>(second), first_rows,
                                  pointer<int32_t>(places), pointer<void>(rows),   row_shape(count, width, 1, dtype)};
  move_rows(moe::cuda::permute, params, device, stream, "join");
}

void disjoin(uintptr_t rows, uintptr_t places, uintptr_t first, uintptr_t second, int64_t first_rows, int64_t count,
             int64_t width, int dtype, int device, uintptr_t stream) {
  const moe::DisjoinParams params{pointer<void>(rows),   pointer<int32_t>(places), pointer<void>(first),
                                  pointer<void>(second), first_rows,               row_shape(count, width, 1, dtype)};
  move_rows(moe::cuda::disjoin, params, device, stream, "disjoin");
}

void unpermute(uintptr_t rows, uintptr_t weights, uintptr_t inverse_perm, uintptr_t kept_rows, uintptr_t y,
               int64_t tokens, int64_t width, int top_k, int dtype, int device, uintptr_t stream) {
  const moe::UnpermuteParams params{pointer<void>(rows),        pointer<void>(weights),
                                    pointer<int32_t>(inverse_perm), pointer<int32_t>(kept_rows),
                                    pointer<void>(y),           row_shape(tokens, width, top_k, dtype)};
  move_rows(moe::cuda::unpermute, params, device, stream, "unpermute");
}

void unpermute_backward(uintptr_t grad_y, uintptr_t rows, uintptr_t weights, uintptr_t inverse_perm,
                        uintptr_t kept_rows, uintptr_t grad_rows, uintptr_t grad_weights, int64_t tokens,
                        int64_t width, int top_k, int dtype, int device, uintptr_t stream) {
  const moe::UnpermuteBackwardParams params{
      pointer<void>(grad_y),       pointer<void>(rows),         pointer<void>(weights),
      pointer<int32_t>(inverse_perm), pointer<int32_t>(kept_rows), pointer<void>(grad_rows),
      pointer<void>(grad_weights), row_shape(tokens, width, top_k, dtype)};
  move_rows(moe::cuda::unpermute_backward, params, device, stream, "unpermute_backward");
}

void sinkhorn(uintptr_t logits, int64_t row_stride, uintptr_t scores, uintptr_t workspace, int64_t tokens,
              int experts, int dtype, int iterations, float temperature, float tolerance, int device,
              uintptr_t stream) {
  const moe::SinkhornParams params{pointer<void>(logits), row_stride,         pointer<float>(scores),
                                   pointer<float>(workspace), tokens,         experts,
                                   moe::DType(dtype),     iterations,         temperature,
                                   tolerance};
  moe::bindings::run<Cuda>(moe::cuda::sinkhorn, params, device, stream, "sinkhorn", std::pair("tokens", tokens),
                           std::pair("experts", experts), std::pair("dtype", dtype),
                           std::pair("iterations", iterations));
}

// (number of devices, "" or why there are none)
pybind11::tuple device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return pybind11::make_tuple(count, "");
  cudaGetLastError();  // the question must not leave an error behind
  return pybind11::make_tuple(0, moe::bindings::explain_cuda(error));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of moe_lightning";
  moe::bindings::bind<Cuda>(m);
  m.def("permute", &permute, "(x, inverse_perm, rows, tokens, width, top_k, dtype, device, stream)");
  m.def("join", &join, "(first, second, first_rows, places, rows, count, width, dtype, device, stream)");
  m.def("disjoin", &disjoin, "(rows, places, first, second, first_rows, count, width, dtype, device, stream)");
  m.def("unpermute", &unpermute,
        "(rows, weights, inverse_perm, kept_rows, y, tokens, width, top_k, dtype, device, stream)");
  m.def("unpermute_backward", &unpermute_backward,
        "(grad_y, rows, weights, inverse_perm, kept_rows, grad_rows, grad_weights, "
        "tokens, width, top_k, dtype, device, stream)");
  m.def("sinkhorn", &sinkhorn,
        "(logits, row_stride, scores, workspace, tokens, experts, dtype, iterations, temperature, tolerance, "
        "device, stream)");
  m.def("sinkhorn_workspace", &moe::cuda::sinkhorn_workspace, "(experts) -> fp32 elements of workspace");
  moe::bindings::bind_counts(m);
  moe::bindings::bind_symmetric(m);
  moe::bindings::bind_ffn(m);
  m.def("device_count", &device_count, "() -> (devices, '' or why there are none)");
}
