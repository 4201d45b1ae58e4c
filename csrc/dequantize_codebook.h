// ggml's types whose weights are vectors of a grid. The grid, fixed for a type, is the caller's: the gguf package has it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kt {

// 256 weights in `bytes` bytes. decode(data, blocks, grid [rows * columns], out [blocks * 256]): any bytes index within it.
struct CodebookType {
  const char* name;
  int bytes;
  int grid_rows, grid_columns;
  void (*decode)(const uint8_t* data, size_t blocks, const int8_t* grid, float* out);
};

constexpr int kCodebookBlock = 256;
const std::vector<CodebookType>& codebook_types();

}  // namespace kt
