#include "error_bindings.h"

#include <string>

#include "error_sums.h"

namespace kt {
namespace {

py::tuple as_tuple(const ErrorSums& sums) {
  return py::make_tuple(sums.source_square, sums.stored_square, sums.error_square, sums.max_abs_error);
}

MatrixView matrix_of(const py::array& values, const char* name, int rows, int cols) {
  if (is_bf16(values, name)) return {read<uint16_t>(values, name, {rows, cols}), true, rows, cols};
  return {read<float>(values, name, {rows, cols}), false, rows, cols};
}

py::tuple error_sums(const py::array& source, const py::array& stored) {
  const py::ssize_t size = source.size();
  const float* a = read<float>(source, "source", {size});
  const float* b = read<float>(stored, "stored", {size});
  ErrorSums sums;
  {
    py::gil_scoped_release release;
    add_errors(a, b, static_cast<size_t>(size), sums);
  }
  return as_tuple(sums);
}

py::tuple expert_errors_py(const std::string& format, const py::array& gate, const py::array& up, const py::array& down,
                           const py::array& blob) {
  if (gate.ndim() != 2) fail("gate must have 2 dimensions, got " + shape_text(gate));
  const int inner = checked_int(gate.shape(0), "gate"), hidden = checked_int(gate.shape(1), "gate");
  const MatrixView g = matrix_of(gate, "gate", inner, hidden), u = matrix_of(up, "up", inner, hidden),
                   d = matrix_of(down, "down", hidden, inner);
  const Format id = format_by_name(format).format;
  const auto bytes = static_cast<py::ssize_t>(ExpertShape(id, hidden, inner).blob_bytes());
  const uint8_t* data = read<uint8_t>(blob, "blob", {bytes});
  ErrorSums sums[3];
  {
    py::gil_scoped_release release;
    expert_errors(id, data, g, u, d, sums);
  }
  return py::make_tuple(as_tuple(sums[0]), as_tuple(sums[1]), as_tuple(sums[2]));
}

}  // namespace

void bind_errors(py::module_& m) {
  m.def("error_sums", &error_sums, py::arg("source"), py::arg("stored"));
  m.def("expert_errors", &expert_errors_py, py::arg("format"), py::arg("gate"), py::arg("up"), py::arg("down"),
        py::arg("blob"));
}

}  // namespace kt
