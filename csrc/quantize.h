// Weight quantisation: rows of a matrix to int8 or int4 codes, and codes to the strips of an expert blob.
// Compiled once, without ISA flags and without FMA contraction: the bytes do not depend on the machine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace kt {

// A row-major matrix of float or bf16.
struct MatrixView {
  const void* data;
  bool is_bf16;
  int rows;
  int cols;

  // Row r as float in `out` [cols].
  void row(int r, float* out) const;
};

// Codes of one matrix, row-major. int8: q [rows, cols]. int4: q [rows, padded / 2] (low nibble: even column), s and z
// [rows, padded / group]; weight = row_scale * (s * q - z).
// Throw std::invalid_argument on NaN or inf, naming row and column.
void quantize_int8(const MatrixView& w, int8_t* q, float* row_scale);
void quantize_int4(const MatrixView& w, int group, uint8_t* q, uint8_t* s, uint8_t* z, float* row_scale);

// Row-major codes as above of an [n, k] matrix, in the order strips want them.
struct CodeView {
  const void* q;
  const uint8_t* s;
  const uint8_t* z;
  int n;
  int k;
};

// Writes weight row `row` of `codes` to column `col` (0..31) of the strip at `strip`, which must start zeroed.
void place_row(const FormatInfo& info, const CodeView& codes, int row, uint8_t* strip, int col);

// gate, up [I, H], down [H, I] -> blob (ExpertShape::blob_bytes() bytes, fully overwritten).
void pack_expert(Format format, const MatrixView& gate, const MatrixView& up, const MatrixView& down, uint8_t* blob);

enum class ExpertMatrix { kGate, kUp, kDown };

// One row of a matrix of the blob, as float. Not of block formats.
void unpack_row(const ExpertShape& shape, const uint8_t* blob, ExpertMatrix matrix, int row, float* out);

// The weights a blob stands for, as float. gate, up [I, H], down [H, I].
void unpack_expert(ExpertFormat format, const uint8_t* blob, int hidden_size, int moe_intermediate_size, float* gate,
                   float* up, float* down);

}  // namespace kt
