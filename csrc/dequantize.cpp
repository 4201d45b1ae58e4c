#include "dequantize.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "clones.h"

// Layouts are those of ggml (ggml-common.h, "quantization"); products and differences are taken in the order of the gguf
// package's NumPy code, each rounded to float32, so that the numbers are the same bits. Compiled without contraction.
#define KT_INLINE inline __attribute__((always_inline))

namespace kt {
namespace {

KT_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A float16 in two bytes. Subnormals: m * 2^-24.
KT_INLINE float half(const uint8_t* p) {
  const uint32_t bits = p[0] | static_cast<uint32_t>(p[1]) << 8;
  const uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3FF;
  if (exponent == 31) return from_bits(sign | 0x7F800000 | mantissa << 13);
  if (exponent > 0) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float small = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
  return sign ? -small : small;
}

KT_CLONES void decode_q8_0(const uint8_t* data, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 34, out += 32) {
    const float d = half(data);
    int8_t q[32];
    std::memcpy(q, data + 2, sizeof q);
    for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(q[i]) * d;
  }
}

KT_CLONES void decode_q4_0(const uint8_t* data, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 18, out += 32) {
    const float d = half(data);
    uint8_t q[16];
    std::memcpy(q, data + 2, sizeof q);
    for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>((q[i] & 15) - 8);
    for (int i = 0; i < 16; ++i) out[16 + i] = d * static_cast<float>((q[i] >> 4) - 8);
  }
}

// Scales and minima of the 8 sub-blocks of Q4_K and Q5_K: 6 bits each in 12 bytes.
struct SubBlocks {
  float scale[8];
  float minimum[8];
};

KT_INLINE void read_sub_blocks(const uint8_t* data, SubBlocks& sub) {
  const float d = half(data), dmin = half(data + 2);
  const uint8_t* packed = data + 4;
  for (int i = 0; i < 4; ++i) {
    const int low = packed[i], high = packed[4 + i], rest = packed[8 + i];
    sub.scale[i] = d * static_cast<float>(low & 63);
    sub.minimum[i] = dmin * static_cast<float>(high & 63);
    sub.scale[4 + i] = d * static_cast<float>((rest & 15) | (low >> 2 & 48));
    sub.minimum[4 + i] = dmin * static_cast<float>(rest >> 4 | (high >> 2 & 48));
  }
}

KT_CLONES void decode_q4_k(const uint8_t* data, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 144, out += 256) {
    SubBlocks sub;
    read_sub_blocks(data, sub);
    for (int pair = 0; pair < 4; ++pair) {
      uint8_t q[32];
      std::memcpy(q, data + 16 + 32 * pair, sizeof q);
      for (int side = 0; side < 2; ++side) {
        const float scale = sub.scale[2 * pair + side], minimum = sub.minimum[2 * pair + side];
        float* to = out + 64 * pair + 32 * side;
        for (int i = 0; i < 32; ++i) to[i] = scale * static_cast<float>(q[i] >> 4 * side & 15) - minimum;
      }
    }
  }
}

// 32 weights of Q5_K; the shifts are known to the compiler.
template <int kPart>
KT_INLINE void decode_q5_part(const uint8_t* low, const uint8_t* high, const SubBlocks& sub, float* out) {
  const float scale = sub.scale[kPart], minimum = sub.minimum[kPart];
  for (int i = 0; i < 32; ++i) {
    const int code = (low[i] >> (kPart % 2 * 4) & 15) | (high[i] >> kPart & 1) << 4;
    out[32 * kPart + i] = scale * static_cast<float>(code) - minimum;
  }
}

KT_CLONES void decode_q5_k(const uint8_t* data, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 176, out += 256) {
    SubBlocks sub;
    read_sub_blocks(data, sub);
    uint8_t high[32], low[128];
    std::memcpy(high, data + 16, sizeof high);
    std::memcpy(low, data + 48, sizeof low);
    decode_q5_part<0>(low, high, sub, out);
    decode_q5_part<1>(low, high, sub, out);
    decode_q5_part<2>(low + 32, high, sub, out);
    decode_q5_part<3>(low + 32, high, sub, out);
    decode_q5_part<4>(low + 64, high, sub, out);
    decode_q5_part<5>(low + 64, high, sub, out);
    decode_q5_part<6>(low + 96, high, sub, out);
    decode_q5_part<7>(low + 96, high, sub, out);
  }
}

KT_CLONES void decode_q6_k(const uint8_t* data, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 210, out += 256) {
    const float d = half(data + 208);
    int8_t scales[16];
    std::memcpy(scales, data + 192, sizeof scales);
    for (int part = 0; part < 8; ++part) {
      // Parts 0 to 3 share 64 low and 32 high bytes, parts 4 to 7 the next ones.
      const uint8_t* low = data + part / 4 * 64 + part % 2 * 32;
      const uint8_t* high = data + 128 + part / 4 * 32;
      const int low_shift = part % 4 / 2 * 4, high_shift = part % 4 * 2;
      uint8_t l[32], h[32];
      std::memcpy(l, low, sizeof l);
      std::memcpy(h, high, sizeof h);
      const float first = d * static_cast<float>(scales[2 * part]),
                  second = d * static_cast<float>(scales[2 * part + 1]);
      float* to = out + 32 * part;
      for (int i = 0; i < 32; ++i) {
        const int code = ((l[i] >> low_shift & 15) | (h[i] >> high_shift & 3) << 4) - 32;
        to[i] = (i < 16 ? first : second) * static_cast<float>(code);
      }
    }
  }
}

KT_CLONES void decode_mxfp4(const uint8_t* data, size_t blocks, float* out) {
  static const float kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  for (size_t b = 0; b < blocks; ++b, data += 17, out += 32) {
    const uint32_t e = data[0];
    const float d = from_bits(e < 2 ? 0x00200000u << e : (e - 1) << 23);  // half of 2^(e - 127)
    for (int i = 0; i < 16; ++i) out[i] = d * kDoubled[data[1 + i] & 15];
    for (int i = 0; i < 16; ++i) out[16 + i] = d * kDoubled[data[1 + i] >> 4];
  }
}

// One row of codes that share a scale. An e4m3 has its exponent and mantissa where a float has the top of them; the biases
// differ by 120, and a code without exponent bits is m / 8 * 2^-6. Returns whether a code is NaN.
KT_CLONES bool decode_run(const uint8_t* codes, size_t n, float scale, uint16_t* out) {
  uint32_t nan = 0;
  for (size_t i = 0; i < n; ++i) {
    const uint32_t magnitude = codes[i] & 0x7F;
    nan |= magnitude == 0x7F;
    const uint32_t bits = (magnitude << 20) + (120u << 23);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value = magnitude < 8 ? (value - 0.0078125f) * 2.0f : value;
    value *= scale;
    uint32_t product;
    std::memcpy(&product, &value, sizeof product);
    product ^= (codes[i] & 0x80u) << 24;
    out[i] = static_cast<uint16_t>((product + 0x7FFF + (product >> 16 & 1)) >> 16);
  }
  return nan != 0;
}

}  // namespace

const std::vector<GgmlType>& ggml_types() {
  static const std::vector<GgmlType> table = {
      {"Q4_0", 32, 18, decode_q4_0},   {"Q8_0", 32, 34, decode_q8_0},   {"Q4_K", 256, 144, decode_q4_k},
      {"Q5_K", 256, 176, decode_q5_k}, {"Q6_K", 256, 210, decode_q6_k}, {"MXFP4", 32, 17, decode_mxfp4},
  };
  return table;
}

const GgmlType& ggml_type(const std::string& name) {
  std::string known;
  for (const GgmlType& type : ggml_types()) {
    if (name == type.name) return type;
    known += (known.empty() ? "" : ", ") + std::string(type.name);
  }
  throw std::invalid_argument("unknown ggml type " + name + ": expected one of " + known);
}

bool decode_fp8(const Fp8Blocks& blocks, uint16_t* out) {
  const size_t across = (blocks.cols + blocks.block_cols - 1) / blocks.block_cols;
  bool is_nan = false;
  for (size_t r = 0; r < blocks.rows; ++r) {
    const float* scales = blocks.scales + (blocks.first_row + r) / blocks.block_rows * across;
    for (size_t c = 0; c < blocks.cols; c += blocks.block_cols) {
      const size_t at = r * blocks.cols + c, n = std::min(blocks.block_cols, blocks.cols - c);
      is_nan |= decode_run(blocks.codes + at, n, scales[c / blocks.block_cols], out + at);
    }
  }
  return !is_nan;
}

}  // namespace kt
