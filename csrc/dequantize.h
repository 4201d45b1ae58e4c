// Numbers of other programs' weight formats: ggml's blocks and block-scaled FP8. The caller has checked every size; any bytes
// are read without leaving the buffers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace kt {

// One of ggml's types: `block` weights in `bytes` bytes. decode(data, blocks, out): out [blocks * block].
struct GgmlType {
  const char* name;
  int block;
  int bytes;
  void (*decode)(const uint8_t* data, size_t blocks, float* out);
};

// The type of that name. Throws std::invalid_argument listing the names.
template <typename Type>
const Type& type_of_name(const std::vector<Type>& types, const std::string& name) {
  std::string known;
  for (const Type& type : types) {
    if (name == type.name) return type;
    known += (known.empty() ? "" : ", ") + std::string(type.name);
  }
  throw std::invalid_argument("unknown ggml type " + name + ": expected one of " + known);
}

const std::vector<GgmlType>& ggml_types();

// e4m3 codes [rows, cols] with a scale per block of block_rows x block_cols; row 0 is row `first_row` of its block. scales
// [.., ceil(cols / block_cols)], from the block of row 0 on. out: bf16 of code * scale, to nearest even.
struct Fp8Blocks {
  const uint8_t* codes;
  const float* scales;
  size_t rows, cols;
  size_t block_rows, block_cols;
  size_t first_row;
};

// False when a code is e4m3's NaN; then out is of no use.
bool decode_fp8(const Fp8Blocks& blocks, uint16_t* out);

}  // namespace kt
