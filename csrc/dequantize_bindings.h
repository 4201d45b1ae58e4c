// Python's way to dequantize.h.
#pragma once

#include <pybind11/pybind11.h>

namespace kt {

void bind_dequantize(pybind11::module_& m);

}  // namespace kt
