// Arithmetic on float rows outside the GEMMs: norms, rotation, silu, dot products with float or bf16 rows. Plain C++ in
// vectors of 16 lanes. Rows may have any length and alignment; no function allocates or throws.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gqa_part.h"
#include "kernels.h"

namespace kt {

// out = x / sqrt(mean(x^2) + eps) * weight, as x * rsqrt(sum(x^2) + sum_eps) * scaled_weight with sum_eps = n eps and
// scaled_weight = sqrt(n) weight. out may be x.
void rms_norm(const float* x, const float* scaled_weight, size_t n, float sum_eps, float* out);

// Multiplies `pairs` complex numbers of x by those of rotation, both (real, imaginary) side by side.
void rotate_pairs(float* x, const float* rotation, size_t pairs);

// out = silu(gate) * up. out may be gate or up.
void silu_mul(const float* gate, const float* up, size_t n, float* out);

// What an expert makes of gate and up: g * sigmoid(alpha g) * (u + up_offset) with g = min(gate, limit) and u = up within
// +-limit. The defaults are silu(gate) * up.
struct GateShape {
  float alpha = 1.0f;
  float limit = __builtin_inff();
  float up_offset = 0.0f;
};

// silu_mul of the kernel tables for any gate, after a bias [32] for the strip's columns (may be null). is_int8: c is int32.
void gate_mul(const EpilogueArgs& args, bool is_int8, const float* bias, const GateShape& gate);

// y[token[r]][0..cols) += weight[r] * bias[0..cols), of an output that add_weighted has written.
void add_weighted_bias(const EpilogueArgs& args, const float* bias);

// y += scale * x.
void add_scaled(float* y, const float* x, float scale, size_t n);

// To bf16, nearest even.
void round_bf16(const float* x, size_t n, uint16_t* out);

// out[r] = x . row r of a matrix [rows, n], float or bf16.
void dot_rows_f32(const float* x, const float* matrix, int rows, size_t n, float* out);
void dot_rows_bf16(const float* x, const uint16_t* matrix, int rows, size_t n, float* out);

// out[c] = sum over r of x[r] * matrix[r][c], a bf16 matrix [rows, n].
void sum_rows_bf16(const float* x, const uint16_t* matrix, int rows, size_t n, float* out);

constexpr int kAttendQueries = 4;  // per call: each key is loaded once for all of them

// Attention of up to kAttendQueries queries [count][width] on the same keys, bf16 rows [keys][key_stride]; the first
// value_width numbers of a key are its value. scores: scratch [count][keys]. out [count][value_width].
void attend_shared_bf16(const float* queries, int count, size_t width, const uint16_t* rows, size_t key_stride,
                        int keys, size_t value_width, float scale, float* scores, float* out);

// Attention of up to kAttendQueries queries [count][width] on part of their context, before the division: out [count][width]
// is the sum of e^(logit - largest) value, logits are scale query . key. scores: scratch [count][rows.count].
void attend_part_bf16(const float* queries, int count, size_t width, const KeyRows& rows, float scale, float* scores,
                      float* out, PartialSoftmax* sums);

}  // namespace kt
