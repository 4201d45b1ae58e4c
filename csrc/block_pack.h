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

// Rows of ggml blocks: gate, up [I] rows of H, down [H] rows of I -> blob (fully overwritten) and back.
// Throws std::invalid_argument for a scale that is NaN or inf, naming row and column.
void pack_ggml_expert(ExpertFormat format, int hidden_size, int moe_intermediate_size, const uint8_t* gate,
                      const uint8_t* up, const uint8_t* down, uint8_t* blob);
void unpack_ggml_expert(ExpertFormat format, int hidden_size, int moe_intermediate_size, const uint8_t* blob,
                        uint8_t* gate, uint8_t* up, uint8_t* down);

}  // namespace kt
