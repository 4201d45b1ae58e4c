// Python's view of gqa_step.h.
#pragma once

#include <pybind11/pybind11.h>

namespace kt {

void bind_gqa(pybind11::module_& m);

}  // namespace kt
