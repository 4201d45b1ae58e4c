#include "dequantize.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "clones.h"
#include "ggml_half.h"

// Layouts are those of ggml (ggml-common.h, "quantization"); products and differences are taken in the order of the gguf
// package's NumPy code, each rounded to float32, so that the numbers are the same bits. Compiled without contraction.
namespace kt {
namespace {

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

KT_CLONES void decode_q4_1(const uint8_t* data, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 20, out += 32) {
    const float d = half(data), m = half(data + 2);
    for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>(data[4 + i] & 15) + m;
    for (int i = 0; i < 16; ++i) out[16 + i] = d * static_cast<float>(data[4 + i] >> 4) + m;
  }
}

// The fifth bits of 32 codes are one integer.
KT_INLINE void read_q5(const uint8_t* high, const uint8_t* low, int32_t* codes) {
  const uint32_t top = read_u32(high);
  for (int i = 0; i < 16; ++i) codes[i] = static_cast<int32_t>((low[i] & 15) | (top >> i & 1) << 4);
  for (int i = 0; i < 16; ++i) codes[16 + i] = static_cast<int32_t>(low[i] >> 4 | (top >> (16 + i) & 1) << 4);
}

KT_CLONES void decode_q5_0(const uint8_t* data, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 22, out += 32) {
    const float d = half(data);
    int32_t codes[32];
    read_q5(data + 2, data + 6, codes);
    for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(codes[i] - 16);
  }
}

KT_CLONES void decode_q5_1(const uint8_t* data, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 24, out += 32) {
    const float d = half(data), m = half(data + 2);
    int32_t codes[32];
    read_q5(data + 4, data + 8, codes);
    for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(codes[i]) + m;
  }
}

KT_CLONES void decode_q2_k(const uint8_t* data, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 84, out += 256) {
    const float d = half(data + 80), dmin = half(data + 82);
    for (int sub = 0; sub < 16; ++sub) {
      const float scale = d * static_cast<float>(data[sub] & 15), minimum = dmin * static_cast<float>(data[sub] >> 4);
      const int shift = sub / 2 % 4 * 2;
      uint8_t q[16];
      std::memcpy(q, data + 16 + sub / 8 * 32 + sub % 2 * 16, sizeof q);
      for (int i = 0; i < 16; ++i) out[16 * sub + i] = scale * static_cast<float>(q[i] >> shift & 3) - minimum;
    }
  }
}

// Sixteen 6-bit scales, offset by 32, in 12 bytes: four low bits in the first 8, two high ones in the last 4.
KT_CLONES void decode_q3_k(const uint8_t* data, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 110, out += 256) {
    const float d = half(data + 108);
    const uint8_t* scales = data + 96;
    for (int sub = 0; sub < 16; ++sub) {
      const int level = (scales[sub % 8] >> sub / 8 * 4 & 15) | (scales[8 + sub % 4] >> sub / 4 * 2 & 3) << 4;
      const float scale = d * static_cast<float>(level - 32);
      const int shift = sub / 2 % 4 * 2, bit = sub / 2;
      uint8_t low[16], high[16];
      std::memcpy(low, data + 32 + sub / 8 * 32 + sub % 2 * 16, sizeof low);
      std::memcpy(high, data + sub % 2 * 16, sizeof high);
      for (int i = 0; i < 16; ++i) {
        const int code = (low[i] >> shift & 3) + (high[i] >> bit & 1) * 4 - 4;
        out[16 * sub + i] = scale * static_cast<float>(code);
      }
    }
  }
}

// The 16 values a code of IQ4_NL and IQ4_XS can have.
const float kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

KT_INLINE void decode_iq4_part(const uint8_t* codes, float scale, float* out) {
  for (int i = 0; i < 16; ++i) out[i] = scale * kIq4Values[codes[i] & 15];
  for (int i = 0; i < 16; ++i) out[16 + i] = scale * kIq4Values[codes[i] >> 4];
}

KT_CLONES void decode_iq4_nl(const uint8_t* data, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 18, out += 32) decode_iq4_part(data + 2, half(data), out);
}

KT_CLONES void decode_iq4_xs(const uint8_t* data, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 136, out += 256) {
    const float d = half(data);
    const uint32_t high = read_u16(data + 2);
    for (int part = 0; part < 8; ++part) {
      const int level = static_cast<int>((data[4 + part / 2] >> part % 2 * 4 & 15) | (high >> 2 * part & 3) << 4);
      decode_iq4_part(data + 8 + 16 * part, d * static_cast<float>(level - 32), out + 32 * part);
    }
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
  // An array first: gcc 12 defines the clones twice where a list of this length initialises the vector.
  static const GgmlType rows[] = {
      {"Q4_0", 32, 18, decode_q4_0},   {"Q4_1", 32, 20, decode_q4_1},     {"Q5_0", 32, 22, decode_q5_0},
      {"Q5_1", 32, 24, decode_q5_1},   {"Q8_0", 32, 34, decode_q8_0},     {"Q2_K", 256, 84, decode_q2_k},
      {"Q3_K", 256, 110, decode_q3_k}, {"Q4_K", 256, 144, decode_q4_k},   {"Q5_K", 256, 176, decode_q5_k},
      {"Q6_K", 256, 210, decode_q6_k}, {"IQ4_NL", 32, 18, decode_iq4_nl}, {"IQ4_XS", 256, 136, decode_iq4_xs},
      {"MXFP4", 32, 17, decode_mxfp4},
  };
  static const std::vector<GgmlType> table(std::begin(rows), std::end(rows));
  return table;
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
