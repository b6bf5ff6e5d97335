// The launchers that both modules have. A Backend names them.
#pragma once

#include "launcher.h"
#include "routing_index.h"
#include "select.h"

namespace moe {

inline Fields fields(const SelectParams& p) {
  return concat({MOE_FIELD(logits), MOE_FIELD(bias), MOE_FIELD(selection_scores), MOE_FIELD(weights), MOE_FIELD(expert_ids),
                 MOE_FIELD(tokens_per_expert), MOE_FIELD(invalid_rows), MOE_FIELD(tokens), MOE_FIELD(experts),
                 MOE_FIELD(top_k), MOE_FIELD(dtype), MOE_FIELD(score), MOE_FIELD(renormalize), MOE_FIELD(row_stride),
                 MOE_FIELD(threads)});
}

inline Fields fields(const SelectBackwardParams& p) {
  return concat({MOE_FIELD(logits), MOE_FIELD(grad_weights), MOE_FIELD(weights), MOE_FIELD(expert_ids),
                 MOE_FIELD(grad_logits), MOE_FIELD(tokens), MOE_FIELD(experts), MOE_FIELD(top_k), MOE_FIELD(dtype),
                 MOE_FIELD(score), MOE_FIELD(renormalize), MOE_FIELD(row_stride)});
}

inline Fields fields(const IndexParams& p) {
  return concat({MOE_FIELD(expert_ids), MOE_FIELD(expert_offsets), MOE_FIELD(perm), MOE_FIELD(inverse_perm),
                 MOE_FIELD(workspace), MOE_FIELD(slots), MOE_FIELD(experts)});
}

namespace bindings {

template <class Backend>
void define_common(py::module_& m) {
  m.attr("MAX_EXPERTS") = kMaxExperts;
  m.attr("MAX_TOP_K") = kMaxTopK;
  define<Backend, Backend::select_forward>(m, "select_forward");
  define<Backend, Backend::select_backward>(m, "select_backward");
  define<Backend, Backend::build_index>(m, "build_index");
  m.def("index_workspace", Backend::index_workspace, py::arg("slots"), py::arg("experts"), "int32 elements of workspace");
}

}  // namespace bindings
}  // namespace moe
