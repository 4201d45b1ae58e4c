// Block formats in plain loops: the semantics every other table is held against, bit for bit.
#include <cmath>
#include <cstring>

#include "blocks.h"
#include "ggml_half.h"

namespace kt {
namespace {

inline float load(const float* x, size_t i) { return x[i]; }
inline float load(const uint16_t* x, size_t i) { return from_bits(static_cast<uint32_t>(x[i]) << 16); }

template <typename T>
void quantize_block(const T* x, size_t n, BlockActivations* out) {
  std::memset(static_cast<void*>(out), 0, sizeof *out);
  uint32_t largest = 0;  // comparing the bits of |x| as integers puts NaN above every number
  for (size_t i = 0; i < n; ++i) {
    const uint32_t bits = to_bits(load(x, i)) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  if (largest >= 0x7f800000u) {
    out->scale = NAN;
    return;
  }
  const float amax = from_bits(largest);
  if (amax < 1e-30f) return;
  const float inverse = 127.0f / amax;
  for (size_t i = 0; i < n; ++i) {
    const int value = static_cast<int>(std::nearbyint(load(x, i) * inverse));
    out->q[i] = static_cast<int8_t>(value);
    out->sum16[i / 16] = static_cast<int16_t>(out->sum16[i / 16] + value);
    out->sum32[i / 32] = static_cast<int16_t>(out->sum32[i / 32] + value);
  }
  out->scale = amax / 127.0f;
}

// Byte i (0..31) of column col among lines that begin at `lines`.
inline uint8_t lane_byte(const uint8_t* lines, int col, int i) {
  return lines[(col / 16) * 512 + (i / 4) * 64 + (col % 16) * 4 + i % 4];
}

// Value `index` (0..7: scales, 8..15: mins) of a column in 6 bits.
inline int six_bits(const uint8_t* block, int col, int index) {
  const uint8_t* lines = block + kScaleLinesOffset;
  const int line = index / 2, at = col * 2 + index % 2;
  if (line < 6) return lines[line * 64 + at] & 63;
  const uint8_t* upper = lines + (line - 6) * 192 + at;
  return upper[0] >> 6 | upper[64] >> 6 << 2 | upper[128] >> 6 << 4;
}

inline int code4(const uint8_t* codes, int col, int k) {
  const int byte = lane_byte(codes + k / 64 * 1024, col, k % 32);
  return k % 64 < 32 ? byte & 15 : byte >> 4;
}

// One column of a Q4_K or Q5_K block times one block of activations, without the activations' scale.
template <bool Fifth>
float dot_q45(const uint8_t* block, const BlockActivations& a, int col) {
  const uint8_t* codes = block + (Fifth ? kQ5KCodesOffset : kBlockHeaderBytes);
  int32_t total = 0, mins = 0;
  for (int sub = 0; sub < 8; ++sub) {
    int32_t part = 0;
    for (int k = sub * 32; k < sub * 32 + 32; ++k) {
      int code = code4(codes, col, k);
      if (Fifth) code |= (lane_byte(block + kBlockHeaderBytes, col, k % 32) >> sub & 1) << 4;
      part += code * a.q[k];
    }
    total += part * six_bits(block, col, sub);
    mins += a.sum32[sub] * six_bits(block, col, 8 + sub);
  }
  return static_cast<float>(total) * half(block + col * 2) - static_cast<float>(mins) * half(block + 64 + col * 2);
}

float dot_q6(const uint8_t* block, const BlockActivations& a, int col) {
  int32_t total = 0, offset = 0;
  for (int sub = 0; sub < 16; ++sub) {
    const uint8_t* half = block + kQ6KHalvesOffset + sub / 8 * kQ6KHalfBytes;
    const int quarter = sub % 8 / 2;  // 32 inputs of the half: 0, 1 in low nibbles, 2, 3 in high ones
    int32_t part = 0;
    for (int i = sub % 2 * 16; i < sub % 2 * 16 + 16; ++i) {
      const int byte = lane_byte(half + 1024 + quarter % 2 * 1024, col, i);
      const int code = (quarter < 2 ? byte & 15 : byte >> 4) | (lane_byte(half, col, i) >> 2 * quarter & 3) << 4;
      part += code * a.q[sub / 2 * 32 + i];
    }
    const int scale = static_cast<int8_t>(block[kQ6KScalesOffset + sub / 2 * 64 + col * 2 + sub % 2]);
    total += part * scale;
    offset += a.sum16[sub] * scale;
  }
  return static_cast<float>(total - 32 * offset) * half(block + col * 2);
}

template <typename Dot>
void vec_k(const VecArgs& args, int bytes, Dot dot) {
  const int blocks = args.k_steps / 4;
  for (int r = 0; r < args.rows; ++r) {
    const auto* a = reinterpret_cast<const BlockActivations*>(static_cast<const char*>(args.a) + r * args.a_stride);
    float* c = static_cast<float*>(args.c) + r * kStripCols;
    for (int col = 0; col < kStripCols; ++col) {
      float total = 0.0f;
      for (int i = 0; i < blocks; ++i) {
        total += dot(args.b + static_cast<size_t>(i) * static_cast<size_t>(bytes), a[i], col) * a[i].scale;
      }
      c[col] = total;
    }
  }
}

void vec_q8(const VecArgs& args) {
  for (int r = 0; r < args.rows; ++r) {
    const auto* a = reinterpret_cast<const BlockActivations*>(static_cast<const char*>(args.a) + r * args.a_stride);
    float* c = static_cast<float*>(args.c) + r * kStripCols;
    for (int col = 0; col < kStripCols; ++col) {
      float total = 0.0f;
      for (int step = 0; step < args.k_steps; ++step) {
        const uint8_t* block = args.b + static_cast<size_t>(step) * kQ8_0Bytes;
        for (int sub = 0; sub < 2; ++sub) {
          const int8_t* q = a[step / 4].q + step % 4 * 64 + sub * 32;
          int32_t part = 0;
          for (int i = 0; i < 32; ++i) {
            const int k = sub * 32 + i;
            const uint8_t* at = block + kQ8_0CodesOffset + (col / 16) * 1024 + (k / 4) * 64 + (col % 16) * 4 + k % 4;
            part += static_cast<int8_t>(*at) * q[i];
          }
          total += static_cast<float>(part) * half(block + sub * 64 + col * 2) * a[step / 4].scale;
        }
      }
      c[col] = total;
    }
  }
}

void vec(BlockKind kind, const VecArgs& args) {
  if (kind == BlockKind::kQ4K) {
    vec_k(args, kQ4KBytes, dot_q45<false>);
  } else if (kind == BlockKind::kQ5K) {
    vec_k(args, kQ5KBytes, dot_q45<true>);
  } else if (kind == BlockKind::kQ6K) {
    vec_k(args, kQ6KBytes, dot_q6);
  } else {
    vec_q8(args);
  }
}

}  // namespace

extern const BlockTable kScalarBlocks = {quantize_blocks<float, quantize_block<float>>,
                                         quantize_blocks<uint16_t, quantize_block<uint16_t>>, vec, nullptr};

}  // namespace kt
