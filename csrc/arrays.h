// NumPy arrays from Python, checked: dtype, shape, contiguity. Whatever is wrong throws std::invalid_argument.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace kt {

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline std::string shape_text(const py::array& array) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

template <typename T>
inline bool is_dtype(const py::array& array) {
  return py::isinstance<py::array_t<T>>(array);
}

inline void check_contiguous(const py::array& array, const char* name, int ndim) {
  if (array.ndim() != ndim)
    fail(std::string(name) + " must have " + std::to_string(ndim) + " dimensions, got " + shape_text(array));
  if (!(array.flags() & py::array::c_style)) fail(std::string(name) + " must be C-contiguous");
}

template <typename T>
const T* read(const py::array& array, const char* name, std::vector<py::ssize_t> shape) {
  if (!is_dtype<T>(array))
    fail(std::string(name) + " must be " + std::string(py::str(py::dtype::of<T>())) + ", got " +
         std::string(py::str(array.dtype())));
  check_contiguous(array, name, static_cast<int>(shape.size()));
  for (size_t i = 0; i < shape.size(); ++i) {
    if (array.shape(static_cast<py::ssize_t>(i)) != shape[i]) {
      fail(std::string(name) + " has shape " + shape_text(array) + ", expected " + std::to_string(shape[i]) +
           " in dimension " + std::to_string(i));
    }
  }
  return static_cast<const T*>(array.data());
}

template <typename T>
T* write(py::array& array, const char* name, std::vector<py::ssize_t> shape) {
  read<T>(array, name, std::move(shape));
  if (!array.writeable()) fail(std::string(name) + " must be writeable");
  return static_cast<T*>(array.mutable_data());
}

// float32 or bf16 (as uint16).
inline bool is_bf16(const py::array& array, const char* name) {
  if (is_dtype<uint16_t>(array)) return true;
  if (is_dtype<float>(array)) return false;
  fail(std::string(name) + " must be float32 or uint16 (bf16 bits), got " + std::string(py::str(array.dtype())));
}

inline int checked_int(py::ssize_t value, const char* name) {
  if (value < 1 || value > (1 << 20)) fail(std::string(name) + " must be 1 to 1048576, got " + std::to_string(value));
  return static_cast<int>(value);
}

}  // namespace kt
