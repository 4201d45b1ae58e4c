// Python's view of gqa_step.h.
#pragma once

#include "arrays.h"

namespace kt {

void bind_gqa(py::module_& m);

}  // namespace kt
