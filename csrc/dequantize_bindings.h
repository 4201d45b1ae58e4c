// Python's way to dequantize.h.
#pragma once

#include "arrays.h"

namespace kt {

void bind_dequantize(py::module_& m);

}  // namespace kt
