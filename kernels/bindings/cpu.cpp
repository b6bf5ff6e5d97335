// The module moe_lightning._cpu.
#include "common.h"

namespace {

struct Cpu {
  struct Guard {
    explicit Guard(int) {}
  };
  static constexpr auto select_forward = &moe::cpu::select_forward;
  static constexpr auto select_backward = &moe::cpu::select_backward;
  static constexpr auto build_index = &moe::cpu::build_index;
  static constexpr auto index_workspace = &moe::cpu::index_workspace;
  static std::string explain(int) { return "not a CUDA build"; }
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of moe_lightning";
  moe::bindings::define_common<Cpu>(m);
}
