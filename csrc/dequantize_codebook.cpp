#include "dequantize_codebook.h"

#include "clones.h"
#include "ggml_half.h"

// ggml's i-quants: groups of 8 (or 4) weights are an index into a grid of vectors, with signs apart. As in dequantize.cpp the
// products are taken in the order of the gguf package's NumPy code. Every index is masked to the size of its grid.
namespace kt {
namespace {

// Seven signs in seven bits; the eighth makes their number even.
KT_INLINE uint32_t even_signs(uint32_t seven) { return seven | static_cast<uint32_t>(__builtin_parity(seven)) << 7; }

// kCount weights: scale * grid, negative where the bit of `signs` is set.
template <int kCount>
KT_INLINE void signed_row(const int8_t* row, float scale, uint32_t signs, float* out) {
  for (int i = 0; i < kCount; ++i) {
    const float product = scale * static_cast<float>(row[i]);
    out[i] = from_bits(to_bits(product) ^ (signs >> i & 1) << 31);
  }
}

KT_INLINE void shifted_row(const int8_t* row, float scale, float delta, float* out) {
  for (int i = 0; i < 8; ++i) out[i] = scale * (static_cast<float>(row[i]) + delta);
}

KT_CLONES void decode_iq2_xxs(const uint8_t* data, size_t blocks, const int8_t* grid, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 66) {
    const float d = half(data);
    for (int part = 0; part < 8; ++part) {
      const uint8_t* indices = data + 2 + 8 * part;
      const uint32_t rest = read_u32(indices + 4);
      const float scale = d * (0.5f + static_cast<float>(rest >> 28)) * 0.25f;
      for (int i = 0; i < 4; ++i, out += 8) {
        signed_row<8>(grid + 8 * indices[i], scale, even_signs(rest >> 7 * i & 127), out);
      }
    }
  }
}

KT_CLONES void decode_iq2_xs(const uint8_t* data, size_t blocks, const int8_t* grid, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 74) {
    const float d = half(data);
    for (int i = 0; i < 32; ++i, out += 8) {
      const uint32_t code = read_u16(data + 2 + 2 * i);
      const int level = data[66 + i / 4] >> i / 2 % 2 * 4 & 15;
      const float scale = d * (0.5f + static_cast<float>(level)) * 0.25f;
      signed_row<8>(grid + 8 * (code & 511), scale, even_signs(code >> 9), out);
    }
  }
}

KT_CLONES void decode_iq2_s(const uint8_t* data, size_t blocks, const int8_t* grid, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 82) {
    const float d = half(data);
    for (int i = 0; i < 32; ++i, out += 8) {
      const int index = data[2 + i] | (data[66 + i / 4] >> i % 4 * 2 & 3) << 8;
      const int level = data[74 + i / 4] >> i / 2 % 2 * 4 & 15;
      const float scale = d * (0.5f + static_cast<float>(level)) * 0.25f;
      signed_row<8>(grid + 8 * index, scale, data[34 + i], out);
    }
  }
}

KT_CLONES void decode_iq3_xxs(const uint8_t* data, size_t blocks, const int8_t* grid, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 98) {
    const float d = half(data);
    for (int part = 0; part < 8; ++part) {
      const uint8_t* indices = data + 2 + 8 * part;
      const uint32_t rest = read_u32(data + 66 + 4 * part);
      const float scale = d * (0.5f + static_cast<float>(rest >> 28)) * 0.5f;
      for (int i = 0; i < 4; ++i, out += 8) {
        const uint32_t signs = even_signs(rest >> 7 * i & 127);
        signed_row<4>(grid + 4 * indices[2 * i], scale, signs, out);
        signed_row<4>(grid + 4 * indices[2 * i + 1], scale, signs >> 4, out + 4);
      }
    }
  }
}

KT_CLONES void decode_iq3_s(const uint8_t* data, size_t blocks, const int8_t* grid, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 110) {
    const float d = half(data);
    for (int i = 0; i < 32; ++i, out += 8) {
      const int level = data[106 + i / 8] >> i / 4 % 2 * 4 & 15;
      const float scale = d * static_cast<float>(1 + 2 * level);
      const int high = data[66 + i / 4] >> i % 4 * 2, signs = data[74 + i];
      const int first = data[2 + 2 * i] | (high & 1) << 8, second = data[3 + 2 * i] | (high & 2) << 7;
      signed_row<4>(grid + 4 * first, scale, signs, out);
      signed_row<4>(grid + 4 * second, scale, signs >> 4, out + 4);
    }
  }
}

KT_CLONES void decode_iq1_s(const uint8_t* data, size_t blocks, const int8_t* grid, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 50) {
    const float d = half(data);
    for (int part = 0; part < 8; ++part) {
      const uint32_t rest = read_u16(data + 34 + 2 * part);
      const float scale = d * static_cast<float>(2 * (rest >> 12 & 7) + 1);
      const float delta = rest & 0x8000 ? -0.125f : 0.125f;
      for (int i = 0; i < 4; ++i, out += 8) {
        const uint32_t index = data[2 + 4 * part + i] | (rest >> 3 * i & 7) << 8;
        shifted_row(grid + 8 * index, scale, delta, out);
      }
    }
  }
}

// The float16 scale is in the top four bits of the four words of 3-bit scales.
KT_CLONES void decode_iq1_m(const uint8_t* data, size_t blocks, const int8_t* grid, float* out) {
  for (size_t b = 0; b < blocks; ++b, data += 56) {
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits |= (read_u16(data + 48 + 2 * i) >> 12) << 4 * i;
    const float d = half_of(bits);
    for (int i = 0; i < 32; ++i, out += 8) {
      const uint32_t high = data[32 + i / 2] >> i % 2 * 4;
      const uint32_t level = read_u16(data + 48 + i / 8 * 2) >> i / 2 % 4 * 3 & 7;
      const float scale = d * static_cast<float>(2 * level + 1);
      const uint32_t index = data[i] | (high & 7) << 8;
      shifted_row(grid + 8 * index, scale, high & 8 ? -0.125f : 0.125f, out);
    }
  }
}

}  // namespace

const std::vector<CodebookType>& codebook_types() {
  static const std::vector<CodebookType> table = {
      {"IQ2_XXS", 66, 256, 8, decode_iq2_xxs}, {"IQ2_XS", 74, 512, 8, decode_iq2_xs},
      {"IQ2_S", 82, 1024, 8, decode_iq2_s},    {"IQ3_XXS", 98, 256, 4, decode_iq3_xxs},
      {"IQ3_S", 110, 512, 4, decode_iq3_s},    {"IQ1_S", 50, 2048, 8, decode_iq1_s},
      {"IQ1_M", 56, 2048, 8, decode_iq1_m},
  };
  return table;
}

}  // namespace kt
