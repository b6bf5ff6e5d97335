// The expert feed-forward kernels, where the module is built with CUTLASS.
#pragma once

#include <pybind11/pybind11.h>

namespace moe::bindings {

// Sets CUTLASS to the version the kernels are built with, or to "" where there are none.
#ifdef MOE_CUTLASS
void bind_ffn(pybind11::module_& m);
#else
inline void bind_ffn(pybind11::module_& m) { m.attr("CUTLASS") = ""; }
#endif

}  // namespace moe::bindings
