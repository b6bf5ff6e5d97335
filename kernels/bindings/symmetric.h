// Movement between ranks through each other's memory.
#pragma once

#include <pybind11/pybind11.h>

namespace moe::bindings {

void bind_symmetric(pybind11::module_& m);

}  // namespace moe::bindings
