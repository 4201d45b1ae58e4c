// Portable reference kernels: plain loops, the semantics every other table is held against.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace kt {
namespace {

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float load(const float* x, size_t i) { return x[i]; }
inline float load(const uint16_t* x, size_t i) { return bf16_to_float(x[i]); }

template <typename T>
void quantize_row(const T* x, size_t n, size_t padded, int8_t* q, float* scale, int32_t* sum) {
  uint32_t largest = 0;  // comparing the bits of |x| as integers puts NaN above every number
  for (size_t i = 0; i < n; ++i) {
    const uint32_t bits = float_bits(load(x, i)) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  std::memset(q, 0, padded);
  *sum = 0;
  *scale = 0.0f;
  if (largest >= 0x7f800000u) {
    *scale = NAN;
    return;
  }
  float amax;
  std::memcpy(&amax, &largest, sizeof amax);
  if (amax < 1e-30f) return;
  const float inverse = 127.0f / amax;
  int32_t total = 0;
  for (size_t i = 0; i < n; ++i) {
    const int32_t value = static_cast<int32_t>(std::nearbyint(load(x, i) * inverse));
    q[i] = static_cast<int8_t>(value);
    total += value;
  }
  *sum = total;
  *scale = amax / 127.0f;
}

void quantize_f32(const float* x, size_t n, size_t padded, int8_t* q, float* scale, int32_t* sum) {
  quantize_row(x, n, padded, q, scale, sum);
}

void quantize_bf16(const uint16_t* x, size_t n, size_t padded, int8_t* q, float* scale, int32_t* sum) {
  quantize_row(x, n, padded, q, scale, sum);
}

void vec_s8(const VecArgs& args) {
  auto* c = static_cast<int32_t*>(args.c);
  for (int r = 0; r < args.rows; ++r) {
    const int8_t* a = static_cast<const int8_t*>(args.a) + r * args.a_stride;
    int32_t* row = c + r * kStripCols;
    for (int col = 0; col < kStripCols; ++col) {
      const auto* b = reinterpret_cast<const int8_t*>(args.b) + (col / 16) * kTileBytes + (col % 16) * 4;
      int32_t total = args.accumulate ? row[col] : 0;
      for (int step = 0; step < args.k_steps; ++step) {
        for (int k = 0; k < 64; ++k) {
          total += a[step * 64 + k] * b[step * kStripStepBytes + (k / 4) * 64 + k % 4];
        }
      }
      row[col] = total;
    }
  }
}

void unpack_s4(const uint8_t* strip, int k_steps, int k_group, uint8_t* out) {
  const int block_steps = int4_block_steps(k_group);
  const int high_header = (int4_headers(k_group) - 1) * kInt4HeaderBytes;
  for (int step = 0; step < k_steps; ++step) {
    const uint8_t* block = strip + static_cast<size_t>(step / block_steps) * int4_block_bytes(k_group);
    const uint8_t* codes = block + high_header + kInt4HeaderBytes + (step % block_steps) * kTileBytes;
    for (int i = 0; i < kStripStepBytes; ++i) {
      const int tile = i / kTileBytes, k4 = i % kTileBytes / 64, col = tile * kTileCols + i % 64 / 4;
      const uint8_t packed = codes[tile * 512 + (k4 % 8) * 64 + i % 64];
      const int code = k4 < 8 ? packed & 15 : packed >> 4;
      const uint8_t* header = block + (k4 < 8 ? 0 : high_header);
      out[step * kStripStepBytes + i] = static_cast<uint8_t>(header[col] * code - header[kStripCols + col]);
    }
  }
}

void vec_s4(const VecArgs& args) {
  const int block_steps = int4_block_steps(args.k_group);
  uint8_t unpacked[4 * kStripStepBytes];  // a block has at most 4 k-steps
  VecArgs part = args;
  part.b = unpacked;
  for (int step = 0; step < args.k_steps; step += block_steps) {
    part.k_steps = args.k_steps - step < block_steps ? args.k_steps - step : block_steps;
    unpack_s4(args.b + static_cast<size_t>(step / block_steps) * int4_block_bytes(args.k_group), part.k_steps,
              args.k_group, unpacked);
    part.a = static_cast<const int8_t*>(args.a) + step * 64;
    part.accumulate = args.accumulate || step > 0;
    vec_s8(part);
  }
}

void vec_bf16(const VecArgs& args) {
  auto* c = static_cast<float*>(args.c);
  for (int r = 0; r < args.rows; ++r) {
    const auto* a = reinterpret_cast<const float*>(static_cast<const char*>(args.a) + r * args.a_stride);
    float* row = c + r * kStripCols;
    for (int col = 0; col < kStripCols; ++col) {
      const auto* b = reinterpret_cast<const uint16_t*>(args.b) + (col / 16) * 512 + (col % 16) * 2;
      float total = args.accumulate ? row[col] : 0.0f;
      for (int k = 0; k < args.k_steps * 32; ++k) {
        total += a[k] * bf16_to_float(b[(k / 32) * 1024 + ((k % 32) / 2) * 32 + k % 2]);
      }
      row[col] = total;
    }
  }
}

template <typename T>
inline float value_at(const EpilogueArgs& e, int r, int col) {
  const T raw = static_cast<const T*>(e.c)[r * kStripCols + col];
  return e.scale_a ? static_cast<float>(raw) * (e.scale_a[r] * e.scale_b[col]) : static_cast<float>(raw);
}

template <typename T>
void silu_mul(const EpilogueArgs& e) {
  for (int r = 0; r < e.rows; ++r) {
    for (int col = 0; col < kTileCols; ++col) {
      const float gate = value_at<T>(e, r, col);
      e.h[r * e.h_stride + col] = gate / (1.0f + std::exp(-gate)) * value_at<T>(e, r, col + kTileCols);
    }
  }
}

template <typename T>
void silu_pair(const EpilogueArgs& e) {
  EpilogueArgs up = e;
  up.c = e.c_up;
  up.scale_b = e.scale_b_up;
  for (int r = 0; r < e.rows; ++r) {
    for (int col = 0; col < kStripCols; ++col) {
      const float gate = value_at<T>(e, r, col);
      e.h[r * e.h_stride + col] = gate / (1.0f + std::exp(-gate)) * value_at<T>(up, r, col);
    }
  }
}

template <typename T>
void add_weighted(const EpilogueArgs& e) {
  for (int r = 0; r < e.rows; ++r) {
    float* y = static_cast<float*>(e.out) + e.token[r] * e.out_stride;
    for (int col = 0; col < e.cols; ++col) {
      const float before = e.first[r] ? 0.0f : y[col];
      y[col] = before + e.weight[r] * value_at<T>(e, r, col);
    }
  }
}

template <typename T>
void store_f32(const EpilogueArgs& e) {
  for (int r = 0; r < e.rows; ++r) {
    float* out = static_cast<float*>(e.out) + r * e.out_stride;
    for (int col = 0; col < e.cols; ++col) out[col] = value_at<T>(e, r, col);
  }
}

template <typename T>
void store_bf16(const EpilogueArgs& e) {
  for (int r = 0; r < e.rows; ++r) {
    uint16_t* out = static_cast<uint16_t*>(e.out) + r * e.out_stride;
    for (int col = 0; col < e.cols; ++col) out[col] = float_to_bf16(value_at<T>(e, r, col));
  }
}

// One dot product over the operands' halves, as whatever the compiler makes of a plain loop.
uint64_t peak_s8(uint8_t* operands, int iterations) {
  const auto* a = reinterpret_cast<const int8_t*>(operands);
  const int8_t* b = a + kPeakOperandBytes / 2;
  auto* result = reinterpret_cast<int32_t*>(operands + kPeakOperandBytes);
  for (int i = 0; i < iterations; ++i) {
    int32_t total = 0;
    for (int k = 0; k < kPeakOperandBytes / 2; ++k) total += a[k] * b[k];
    result[i % 64] = total;
  }
  return static_cast<uint64_t>(iterations) * (kPeakOperandBytes / 2) * 2;
}

uint64_t peak_bf16(uint8_t* operands, int iterations) {
  const auto* a = reinterpret_cast<const float*>(operands);
  const float* b = a + kPeakOperandBytes / 8;
  auto* result = reinterpret_cast<float*>(operands + kPeakOperandBytes);
  for (int i = 0; i < iterations; ++i) {
    float total[4] = {};
    for (int k = 0; k < kPeakOperandBytes / 8; ++k) total[k % 4] += a[k] * b[k];
    result[i % 64] = total[0] + total[1] + total[2] + total[3];
  }
  return static_cast<uint64_t>(iterations) * (kPeakOperandBytes / 8) * 2;
}

}  // namespace

extern const KernelTable kScalarTable = {
    "scalar",
    0,
    quantize_f32,
    quantize_bf16,
    vec_s8,
    vec_s4,
    vec_bf16,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    0,
    unpack_s4,
    silu_mul<int32_t>,
    silu_mul<float>,
    silu_pair<int32_t>,
    silu_pair<float>,
    add_weighted<int32_t>,
    add_weighted<float>,
    store_f32<int32_t>,
    store_f32<float>,
    store_bf16<int32_t>,
    store_bf16<float>,
    peak_s8,
    peak_bf16,
};

}  // namespace kt
