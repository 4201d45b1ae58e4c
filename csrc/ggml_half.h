// What every decoder of ggml's blocks begins with: float16 scales out of bytes of any alignment, little-endian integers.
#pragma once

#include <cstdint>
#include <cstring>

#define KT_INLINE inline __attribute__((always_inline))

namespace kt {

KT_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

KT_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

KT_INLINE uint32_t read_u16(const uint8_t* p) { return p[0] | static_cast<uint32_t>(p[1]) << 8; }

KT_INLINE uint32_t read_u32(const uint8_t* p) { return read_u16(p) | read_u16(p + 2) << 16; }

// A float16. Subnormals: m * 2^-24.
KT_INLINE float half_of(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3FF;
  if (exponent == 31) return from_bits(sign | 0x7F800000 | mantissa << 13);
  if (exponent > 0) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float small = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
  return sign ? -small : small;
}

KT_INLINE float half(const uint8_t* p) { return half_of(read_u16(p)); }

}  // namespace kt
