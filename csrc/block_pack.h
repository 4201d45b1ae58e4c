// ggml's blocks into strips and back, without touching a number.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace kt {

// Bytes of a row of k weights, whole blocks, as ggml stores it.
size_t ggml_row_bytes(const FormatInfo& info, int k);

// The weights of one ggml row, in ggml's own float arithmetic. row [ggml_row_bytes], out [k].
void dequantize_row(const FormatInfo& info, const uint8_t* row, int k, float* out);

// data: rows of k weights as ggml stores them. Throws std::invalid_argument for a scale that is NaN or inf, naming row and column.
void check_ggml_scales(const FormatInfo& info, const uint8_t* data, int rows, int k);

// One ggml row of k weights as column `col` (0..31) of a strip that starts zeroed. Returns its largest weight / 127, a row_scale
// for int8 tiles. values: [k], scratch.
float place_ggml_row(const FormatInfo& info, const uint8_t* row, int k, uint8_t* strip, int col, float* values);

// Rows of ggml blocks: gate, up [I] rows of H, down [H] rows of I -> blob (fully overwritten) and back.
// Throws std::invalid_argument for a scale that is NaN or inf, naming row and column.
void pack_ggml_expert(ExpertFormat format, int hidden_size, int moe_intermediate_size, const uint8_t* gate,
                      const uint8_t* up, const uint8_t* down, uint8_t* blob);
void unpack_ggml_expert(ExpertFormat format, int hidden_size, int moe_intermediate_size, const uint8_t* blob,
                        uint8_t* gate, uint8_t* up, uint8_t* down);

}  // namespace kt
