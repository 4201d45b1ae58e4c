// Activation rows on their way into a GEMM: conversion from the caller's type, and the choice of arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.h"

namespace kt {

// The caller's activations, [rows, cols] row-major.
struct Input {
  const void* data;
  bool is_bf16;
  int rows;
  int cols;
  bool may_round = false;  // float rows may become bf16 for the matrix unit

  const void* row(int r) const {
    return static_cast<const char*>(data) + static_cast<size_t>(r) * static_cast<size_t>(cols) * (is_bf16 ? 2 : 4);
  }
};

// Which staged forms a forward needs.
struct StageNeeds {
  bool int8 = false;
  bool bf16 = false;
  bool f32 = false;
  bool blocks = false;

  void add(Arithmetic arithmetic);
};

// bf16 weights: exact float arithmetic for float input; the matrix unit for `rows` >= enough of bf16 input.
Arithmetic arithmetic_for(const KernelTable& kernels, const FormatInfo& info, const Input& x, int rows);
bool uses_tiles(const KernelTable& kernels, Arithmetic arithmetic, int rows);

// Bytes between staged rows. int8 rows are padded to 256 features (the longest block of weights), the others to 32.
size_t int8_stride(int cols);
size_t bf16_stride(int cols);
size_t f32_stride(int cols);
size_t blocks_stride(int cols);
size_t widest_stride(int cols);  // of a row in any form
size_t stage_stride(Arithmetic arithmetic, int cols);

// Converts row r of x to what the arithmetic reads: stage_stride() bytes at out, and for kInt8 its scale and sum.
void convert_row(const KernelTable& kernels, const Input& x, int r, Arithmetic arithmetic, uint8_t* out, float* scale,
                 int32_t* sum);

void reserve_stage(RowStage& stage, const StageNeeds& needs, int rows, int cols);
// Converts row r of x to stage row `to`.
void stage_row(const KernelTable& kernels, const Input& x, int r, const StageNeeds& needs, RowStage& stage, int to);
const uint8_t* staged_row(const RowStage& stage, Arithmetic arithmetic, int cols, int r);

}  // namespace kt
