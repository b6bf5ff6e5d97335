// The Python face of both modules. Integers in: pointers, sizes, a dtype code, the device, the raw stream.
// A Backend names the launchers, guards the device and explains a CUDA error.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "index.h"
#include "select.h"

namespace moe::bindings {

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// "kernels.select_forward: num_experts must be in [1, 1024], got tokens=4, experts=2000, top_k=2, dtype=1"
template <class Backend, class... Sizes>
void check(Status status, const char* name, Sizes... sizes) {
  if (status.ok()) return;
  std::string text = std::string("kernels.") + name + ": " + rule(status.code) + ", got ";
  ((text += std::string(sizes.first) + "=" + std::to_string(sizes.second) + ", "), ...);
  text.erase(text.size() - 2);
  if (status.code != Code::kCuda) throw std::invalid_argument(text);
  throw std::runtime_error(text + ": " + Backend::explain(status.cuda_error));
}

// Runs a launcher on its device without the GIL.
template <class Backend, class Params, class... Sizes>
void run(Status (*launcher)(const Params&, Stream), const Params& params, int device, uintptr_t stream,
         const char* name, Sizes... sizes) {
  Status status;
  {
    const py::gil_scoped_release unlocked;
    const typename Backend::Guard guard(device);
    status = launcher(params, pointer<void>(stream));
  }
  check<Backend>(status, name, sizes...);
}

template <class Backend>
void select_forward(uintptr_t logits, int64_t row_stride, uintptr_t bias, uintptr_t ranks, uintptr_t weights,
                    uintptr_t expert_ids, uintptr_t tokens_per_expert, uintptr_t invalid_rows, int64_t tokens,
                    int experts, int top_k, int dtype, int score, bool renormalize, int device, uintptr_t stream,
                    int threads) {
  const SelectParams params{pointer<void>(logits), row_stride, pointer<float>(bias), pointer<float>(ranks),
                            pointer<void>(weights),
                            pointer<int32_t>(expert_ids), pointer<int32_t>(tokens_per_expert),
                            pointer<int32_t>(invalid_rows), tokens, experts, top_k, DType(dtype), Score(score),
                            renormalize, threads};
  run<Backend>(Backend::select_forward, params, device, stream, "select_forward", std::pair("tokens", tokens),
               std::pair("experts", experts), std::pair("top_k", top_k), std::pair("dtype", dtype),
               std::pair("score", score));
}

template <class Backend>
void select_backward(uintptr_t logits, int64_t row_stride, uintptr_t grad_weights, uintptr_t weights,
                     uintptr_t expert_ids, uintptr_t grad_logits, int64_t tokens, int experts, int top_k, int dtype,
                     int score, bool renormalize, int device, uintptr_t stream) {
  const SelectBackwardParams params{pointer<void>(logits), row_stride, pointer<void>(grad_weights),
                                    pointer<void>(weights), pointer<int32_t>(expert_ids),
                                    pointer<void>(grad_logits), tokens, experts, top_k, DType(dtype), Score(score),
                                    renormalize};
  run<Backend>(Backend::select_backward, params, device, stream, "select_backward", std::pair("tokens", tokens),
               std::pair("experts", experts), std::pair("top_k", top_k), std::pair("dtype", dtype),
               std::pair("score", score));
}

template <class Backend>
void build_index(uintptr_t expert_ids, uintptr_t expert_offsets, uintptr_t perm, uintptr_t inverse_perm,
                 uintptr_t workspace, int64_t slots, int experts, int device, uintptr_t stream) {
  const IndexParams params{pointer<int32_t>(expert_ids), pointer<int32_t>(expert_offsets),
                           pointer<int32_t>(perm), pointer<int32_t>(inverse_perm),
                           pointer<int32_t>(workspace), slots, experts};
  run<Backend>(Backend::build_index, params, device, stream, "build_index", std::pair("slots", slots),
               std::pair("experts", experts));
}

template <class Backend>
void bind(py::module_& m) {
  m.attr("MAX_EXPERTS") = kMaxExperts;
  m.attr("MAX_TOP_K") = kMaxTopK;
  m.def("select_forward", &select_forward<Backend>,
        "(logits, row_stride, bias, ranks, weights, expert_ids, tokens_per_expert, invalid_rows, "
        "tokens, experts, top_k, dtype, score, renormalize, device, stream, threads)");
  m.def("select_backward", &select_backward<Backend>,
        "(logits, row_stride, grad_weights, weights, expert_ids, grad_logits, "
        "tokens, experts, top_k, dtype, score, renormalize, device, stream)");
  m.def("build_index", &build_index<Backend>,
        "(expert_ids, expert_offsets, perm, inverse_perm, workspace, slots, experts, device, stream)");
  m.def("index_workspace", &Backend::index_workspace, "(slots, experts) -> int32 elements of workspace");
}

}  // namespace moe::bindings
