// The launchers that both modules have. A Backend names them.
#pragma once

#include "launcher.h"
#include "routing_index.h"
#include "select.h"

namespace moe {

MOE_FIELDS(SelectParams, logits, bias, selection_scores, mask, weights, expert_ids, tokens_per_expert, invalid_rows,
           gap_counts, tokens, experts, top_k, n_group, topk_group, dtype, score, renormalize, scaling_factor, row_stride,
           threads)
MOE_FIELDS(SelectBackwardParams, logits, grad_weights, weights, expert_ids, grad_logits, tokens, experts, top_k, dtype,
           score, renormalize, scaling_factor, row_stride)
MOE_FIELDS(IndexParams, expert_ids, expert_offsets, perm, inverse_perm, workspace, slots, experts)

namespace bindings {

template <class Backend>
void define_common(py::module_& m) {
  m.attr("MAX_EXPERTS") = kMaxExperts;
  m.attr("MAX_TOP_K") = kMaxTopK;
  m.attr("MAX_GROUPS") = kMaxGroups;
  define<Backend, Backend::select_forward>(m, "select_forward");
  define<Backend, Backend::select_backward>(m, "select_backward");
  define<Backend, Backend::build_index>(m, "build_index");
  m.def("index_workspace", Backend::index_workspace, py::arg("slots"), py::arg("experts"), "int32 elements of workspace");
}

}  // namespace bindings
}  // namespace moe
