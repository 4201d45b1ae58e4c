// Python's view of error_sums.h.
#pragma once

#include "arrays.h"

namespace kt {

void bind_errors(py::module_& m);

}  // namespace kt
