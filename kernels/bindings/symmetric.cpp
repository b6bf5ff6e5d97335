#include "symmetric.h"

#include "cuda_backend.h"
#include "push_pull.h"

namespace moe::bindings {
namespace {

Signals signals(uintptr_t flags, uintptr_t state, uintptr_t report, int64_t timeout_ns, int rank, int ranks) {
  return {pointer<int64_t>(flags), pointer<uint32_t>(state), pointer<int32_t>(report), timeout_ns, rank, ranks};
}

Route route(uintptr_t expert_ids, uintptr_t inverse_perm, uintptr_t shift, int experts, int local_experts) {
  return {pointer<int32_t>(expert_ids), pointer<int32_t>(inverse_perm), pointer<int32_t>(shift), experts, local_experts};
}

void tell(const Signals& signals, int steps, uintptr_t own_offsets, uintptr_t boards, uintptr_t expert_offsets,
          uintptr_t shift, int64_t capacity, int buffer, int experts, int device, uintptr_t stream) {
  const TellParams params{signals,
                          steps,
                          pointer<int32_t>(own_offsets),
                          pointer<int64_t>(boards),
                          pointer<int32_t>(expert_offsets),
                          pointer<int32_t>(shift),
                          capacity,
                          buffer,
                          experts};
  run<Cuda>(cuda::tell, params, device, stream, "tell", std::pair("experts", experts), std::pair("rank", signals.rank),
            std::pair("ranks", signals.ranks));
}

void meet(const Signals& signals, int steps, int device, uintptr_t stream) {
  run<Cuda>(cuda::meet, MeetParams{signals, steps}, device, stream, "meet", std::pair("rank", signals.rank),
            std::pair("ranks", signals.ranks));
}

template <class Params>
void move(Status (*launcher)(const Params&, Stream), const Params& params, int device, uintptr_t stream,
          const char* name) {
  const RowShape& s = params.shape;
  run<Cuda>(launcher, params, device, stream, name, std::pair("tokens", s.tokens), std::pair("width", s.width),
            std::pair("top_k", s.top_k), std::pair("dtype", int(s.dtype)));
}

void push(const Signals& signals, int steps, uintptr_t expert_ids, uintptr_t inverse_perm, uintptr_t shift,
          int experts, int local_experts, uintptr_t x, uintptr_t weights, uintptr_t rows, uintptr_t row_weights,
          int64_t tokens, int64_t width, int top_k, int dtype, int device, uintptr_t stream) {
  const PushParams params{signals,
                          steps,
                          route(expert_ids, inverse_perm, shift, experts, local_experts),
                          pointer<void>(x),
                          pointer<void>(weights),
                          pointer<int64_t>(rows),
                          pointer<int64_t>(row_weights),
                          {tokens, width, top_k, DType(dtype)}};
  move(cuda::push, params, device, stream, "push");
}

void pull(uintptr_t expert_ids, uintptr_t inverse_perm, uintptr_t shift, int experts, int local_experts,
          uintptr_t rows, uintptr_t row_scalars, uintptr_t y, uintptr_t scalars, int64_t tokens, int64_t width,
          int top_k, int dtype, int device, uintptr_t stream) {
  const PullParams params{route(expert_ids, inverse_perm, shift, experts, local_experts),
                          pointer<int64_t>(rows),
                          pointer<int64_t>(row_scalars),
                          pointer<void>(y),
                          pointer<void>(scalars),
                          {tokens, width, top_k, DType(dtype)}};
  move(cuda::pull, params, device, stream, "pull");
}

}  // namespace

void bind_symmetric(py::module_& m) {
  m.attr("MAX_RANKS") = kMaxRanks;
  m.attr("FLAG_WORDS") = kFlagWords;
  py::class_<Signals>(m, "Signals", "(flags, state, report, timeout_ns, rank, ranks)")
      .def(py::init(&signals));
  m.def("tell", &tell,
        "(signals, steps, own_offsets, boards, expert_offsets, shift, capacity, buffer, experts, device, stream)");
  m.def("meet", &meet, "(signals, steps, device, stream)");
  m.def("push", &push,
        "(signals, steps, expert_ids, inverse_perm, shift, experts, local_experts, x, weights, rows, row_weights, "
        "tokens, width, top_k, dtype, device, stream)");
  m.def("pull", &pull,
        "(expert_ids, inverse_perm, shift, experts, local_experts, rows, row_scalars, y, scalars, "
        "tokens, width, top_k, dtype, device, stream)");
}

}  // namespace moe::bindings
