// How far stored weights are from their source: sums over elements in double, in an order that no machine changes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quantize.h"

namespace kt {

struct ErrorSums {
  double source_square = 0.0;
  double stored_square = 0.0;
  double error_square = 0.0;
  float max_abs_error = 0.0f;  // NaN hides here: the squares have it
};

// Adds n elements.
void add_errors(const float* source, const float* stored, size_t n, ErrorSums& sums);

// Errors of an expert in `blob` (no block format): sums[0] of gate, [1] of up, [2] of down; the blob is turned back row by row.
void expert_errors(Format format, const uint8_t* blob, const MatrixView& gate, const MatrixView& up,
                   const MatrixView& down, ErrorSums* sums);

}  // namespace kt
