#include "dequantize_bindings.h"

#include <string>

#include "arrays.h"
#include "dequantize.h"
#include "dequantize_codebook.h"

namespace kt {
namespace {

// Whole blocks of `bytes` bytes; their number.
size_t check_blocks(const py::array& data, int bytes) {
  if (data.ndim() != 1) fail("data must have 1 dimension, got " + shape_text(data));
  read<uint8_t>(data, "data", {data.shape(0)});
  if (data.shape(0) % bytes != 0) {
    fail("data has " + std::to_string(data.shape(0)) + " bytes, expected whole blocks of " + std::to_string(bytes));
  }
  return static_cast<size_t>(data.shape(0) / bytes);
}

py::array_t<float> decode_ggml(const std::string& name, const py::array& data) {
  const GgmlType& type = type_of_name(ggml_types(), name);
  const size_t blocks = check_blocks(data, type.bytes);
  py::array_t<float> values(static_cast<py::ssize_t>(blocks) * type.block);
  const auto* bytes = static_cast<const uint8_t*>(data.data());
  float* out = values.mutable_data();
  py::gil_scoped_release release;
  type.decode(bytes, blocks, out);
  return values;
}

py::array_t<float> decode_codebook(const std::string& name, const py::array& data, const py::array& grid) {
  const CodebookType& type = type_of_name(codebook_types(), name);
  const size_t blocks = check_blocks(data, type.bytes);
  const int8_t* rows = read<int8_t>(grid, "grid", {type.grid_rows, type.grid_columns});
  py::array_t<float> values(static_cast<py::ssize_t>(blocks) * kCodebookBlock);
  const auto* bytes = static_cast<const uint8_t*>(data.data());
  float* out = values.mutable_data();
  py::gil_scoped_release release;
  type.decode(bytes, blocks, rows, out);
  return values;
}

bool decode_fp8_py(const py::array& codes, const py::array& scales, py::ssize_t block_rows, py::ssize_t block_cols,
                   py::ssize_t first_row, py::array out) {
  if (codes.ndim() != 2) fail("codes must have 2 dimensions, got " + shape_text(codes));
  const py::ssize_t rows = codes.shape(0), cols = codes.shape(1);
  if (block_rows < 1 || block_cols < 1 || block_rows > (1 << 20) || block_cols > (1 << 20))
    fail("blocks must be 1 to 1048576 rows and columns");
  if (first_row < 0 || first_row >= block_rows) fail("first_row must be a row of the first block");
  const py::ssize_t down = (first_row + rows + block_rows - 1) / block_rows;
  const py::ssize_t across = (cols + block_cols - 1) / block_cols;
  const uint8_t* data = read<uint8_t>(codes, "codes", {rows, cols});
  const float* scale = read<float>(scales, "scales", {down, across});
  uint16_t* values = write<uint16_t>(out, "out", {rows, cols});
  const Fp8Blocks blocks = {data,
                            scale,
                            static_cast<size_t>(rows),
                            static_cast<size_t>(cols),
                            static_cast<size_t>(block_rows),
                            static_cast<size_t>(block_cols),
                            static_cast<size_t>(first_row)};
  py::gil_scoped_release release;
  return decode_fp8(blocks, values);
}

}  // namespace

void bind_dequantize(py::module_& m) {
  py::dict types;
  for (const GgmlType& type : ggml_types()) types[type.name] = py::make_tuple(type.block, type.bytes);
  m.attr("GGML_TYPES") = types;
  py::dict codebooks;
  for (const CodebookType& type : codebook_types())
    codebooks[type.name] = py::make_tuple(type.bytes, type.grid_rows, type.grid_columns);
  m.attr("GGML_CODEBOOKS") = codebooks;
  m.def("decode_ggml", &decode_ggml, py::arg("type"), py::arg("data"));
  m.def("decode_codebook", &decode_codebook, py::arg("type"), py::arg("data"), py::arg("grid"));
  m.def("decode_fp8", &decode_fp8_py, py::arg("codes"), py::arg("scales"), py::arg("block_rows"), py::arg("block_cols"),
        py::arg("first_row"), py::arg("out"));
}

}  // namespace kt
