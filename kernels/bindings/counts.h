// Counts for exchanges between ranks.
#pragma once

#include <pybind11/pybind11.h>

namespace moe::bindings {

void bind_counts(pybind11::module_& m);

}  // namespace moe::bindings
