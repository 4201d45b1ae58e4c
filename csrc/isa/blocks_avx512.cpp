// Block formats with AVX-512 VNNI: per sub-block an integer dot product of unsigned codes with signed activations, scaled in
// integers; one float product per block. The 6-bit scales stay packed in memory and are taken apart once per block, which a
// row or four share. Few rows are bound by memory: a Q4_K block of 4608 bytes takes 750 cycles to arrive, its 128 dot
// products per row about 130.
//
// For many rows on a matrix unit the same codes become int8 in units of the row's scale, w = (q * s + o) >> 8 in 16 bits.
#include <immintrin.h>

#include <cmath>

#include "blocks.h"

namespace kt {
namespace {

constexpr int kPrefetchBytes = 2048;

inline __m512 load16(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
inline __m512 load16(const uint16_t* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

inline __mmask16 tail_mask(size_t left) { return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }

template <typename T>
inline void quantize_block(const T* x, size_t n, BlockActivations* out) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (size_t i = 0; i < n; i += 16) {
    largest =
        _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(load16(x + i, tail_mask(n - i))), magnitude));
  }
  const uint32_t bits = _mm512_reduce_max_epu32(largest);
  const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(bits))));
  const bool finite = bits < 0x7f800000u, zero = !finite || amax < 1e-30f;
  const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : 127.0f / amax);
  int sums[kBlockInputs / 16];
  for (size_t i = 0; i < kBlockInputs; i += 16) {
    const __mmask16 mask = i < n && !zero ? tail_mask(n - i) : 0;
    const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(load16(x + i, mask), inverse));
    sums[i / 16] = _mm512_reduce_add_epi32(value);
    _mm_store_si128(reinterpret_cast<__m128i*>(out->q + i), _mm512_cvtepi32_epi8(value));
  }
  for (int i = 0; i < kBlockInputs / 16; ++i) out->sum16[i] = static_cast<int16_t>(sums[i]);
  for (int i = 0; i < kBlockInputs / 32; ++i) out->sum32[i] = static_cast<int16_t>(sums[2 * i] + sums[2 * i + 1]);
  out->scale = finite ? (zero ? 0.0f : amax / 127.0f) : NAN;
}

inline __m512i broadcast4(const void* at) {
  int32_t four;
  __builtin_memcpy(&four, at, 4);
  return _mm512_set1_epi32(four);
}

inline __m512 halves(const uint8_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

inline __m512i line_at(const uint8_t* at) { return _mm512_loadu_si512(at); }
inline __m512i low4(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline __m512i high4(__m512i v) { return low4(_mm512_srli_epi16(v, 4)); }

// Two values of each of 16 columns side by side in 16 bits, from one half of a line of bytes.
template <bool Signed>
inline __m512i pairs_of(__m512i line, int tile) {
  const __m256i part = tile ? _mm512_extracti64x4_epi64(line, 1) : _mm512_castsi512_si256(line);
  return Signed ? _mm512_cvtepi8_epi16(part) : _mm512_cvtepu8_epi16(part);
}

// The eight lines of scales and mins that six lines hold.
inline void six_bit_lines(const uint8_t* block, __m512i* out) {
  const __m512i mask = _mm512_set1_epi8(63), two = _mm512_set1_epi8(3);
  __m512i packed[6];
  for (int i = 0; i < 6; ++i) {
    packed[i] = line_at(block + kScaleLinesOffset + i * 64);
    out[i] = _mm512_and_si512(packed[i], mask);
  }
  for (int i = 0; i < 2; ++i) {
    const __m512i a = _mm512_and_si512(_mm512_srli_epi16(packed[3 * i], 6), two);
    const __m512i b = _mm512_and_si512(_mm512_srli_epi16(packed[3 * i + 1], 6), two);
    const __m512i c = _mm512_and_si512(_mm512_srli_epi16(packed[3 * i + 2], 6), two);
    out[6 + i] = _mm512_or_si512(a, _mm512_or_si512(_mm512_slli_epi16(b, 2), _mm512_slli_epi16(c, 4)));
  }
}

// What differs between Q4_K, Q5_K and Q6_K: sub-blocks of kLines lines, their codes, and the scales of a block. `codes`:
// line `line` of sub-block `sub` of a tile, one code per byte.
struct Q4K {
  static constexpr int kBytes = kQ4KBytes, kSubs = 8, kLines = 8;
  static constexpr bool kHasMins = true, kSigned = false;
  static inline __m512i codes(const uint8_t* block, int sub, int tile, int line) {
    const __m512i both = line_at(block + kBlockHeaderBytes + sub / 2 * 1024 + tile * 512 + line * 64);
    return sub % 2 ? high4(both) : low4(both);
  }
  static inline void scales(const uint8_t* block, __m512i* lines) { six_bit_lines(block, lines); }
};

struct Q5K {
  static constexpr int kBytes = kQ5KBytes, kSubs = 8, kLines = 8;
  static constexpr bool kHasMins = true, kSigned = false;
  static inline __m512i codes(const uint8_t* block, int sub, int tile, int line) {
    const __m512i both = line_at(block + kQ5KCodesOffset + sub / 2 * 1024 + tile * 512 + line * 64);
    const __m512i bits = line_at(block + kBlockHeaderBytes + tile * 512 + line * 64);
    const __m512i fifth = sub < 4 ? _mm512_slli_epi16(bits, static_cast<unsigned>(4 - sub))
                                  : _mm512_srli_epi16(bits, static_cast<unsigned>(sub - 4));
    const __m512i low = sub % 2 ? high4(both) : low4(both);
    return _mm512_or_si512(low, _mm512_and_si512(fifth, _mm512_set1_epi8(16)));
  }
  static inline void scales(const uint8_t* block, __m512i* lines) { six_bit_lines(block, lines); }
};

struct Q6K {
  static constexpr int kBytes = kQ6KBytes, kSubs = 16, kLines = 4;
  static constexpr bool kHasMins = false, kSigned = true;
  static inline __m512i codes(const uint8_t* block, int sub, int tile, int line) {
    const uint8_t* half = block + kQ6KHalvesOffset + sub / 8 * kQ6KHalfBytes + tile * 512 + (sub % 2 * 4 + line) * 64;
    const int quarter = sub % 8 / 2;  // 32 inputs of the half: 0, 1 in low nibbles, 2, 3 in high ones
    const __m512i both = line_at(half + 1024 + quarter % 2 * 1024), bits = line_at(half);
    const __m512i upper = quarter == 0   ? _mm512_slli_epi16(bits, 4)
                          : quarter == 1 ? _mm512_slli_epi16(bits, 2)
                          : quarter == 2 ? bits
                                         : _mm512_srli_epi16(bits, 2);
    const __m512i low = quarter < 2 ? low4(both) : high4(both);
    return _mm512_or_si512(low, _mm512_and_si512(upper, _mm512_set1_epi8(48)));
  }
  static inline void scales(const uint8_t* block, __m512i* lines) {
    for (int i = 0; i < 8; ++i) lines[i] = line_at(block + kQ6KScalesOffset + i * 64);
  }
};

// The scale of sub-block `sub` from its pair.
inline __m512i scale_of(__m512i pair, int sub) {
  return _mm512_srai_epi32(sub % 2 ? pair : _mm512_slli_epi32(pair, 16), 16);
}

template <typename Kind, int Rows>
inline void dot_blocks(const VecArgs& args, int first_row) {
  const BlockActivations* a[Rows];
  __m512 result[Rows][2];
  for (int r = 0; r < Rows; ++r) {
    a[r] = reinterpret_cast<const BlockActivations*>(static_cast<const char*>(args.a) +
                                                     static_cast<size_t>(first_row + r) * args.a_stride);
    result[r][0] = result[r][1] = _mm512_setzero_ps();
  }
  constexpr int kLinesPerSub = (Kind::kBytes / 64 + Kind::kSubs - 1) / Kind::kSubs;
  const uint8_t* b = args.b;
  const int blocks = args.k_steps / 4;
  for (int block = 0; block < blocks; ++block, b += Kind::kBytes) {
    __m512i lines[8], total[Rows][2];
    Kind::scales(b, lines);
    for (int r = 0; r < Rows; ++r) total[r][0] = total[r][1] = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int sub = 0; sub < Kind::kSubs; ++sub) {
      for (int i = 0; i < kLinesPerSub; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(b + kPrefetchBytes + (sub * kLinesPerSub + i) * 64), _MM_HINT_T0);
      }
      __m512i part[Rows][2];
      for (int r = 0; r < Rows; ++r) part[r][0] = part[r][1] = _mm512_setzero_si512();
#pragma GCC unroll 8
      for (int line = 0; line < Kind::kLines; ++line) {
        const __m512i b0 = Kind::codes(b, sub, 0, line), b1 = Kind::codes(b, sub, 1, line);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const __m512i four = broadcast4(a[r][block].q + (sub * Kind::kLines + line) * 4);
          part[r][0] = _mm512_dpbusd_epi32(part[r][0], b0, four);
          part[r][1] = _mm512_dpbusd_epi32(part[r][1], b1, four);
        }
      }
#pragma GCC unroll 2
      for (int tile = 0; tile < 2; ++tile) {
        const __m512i scale = scale_of(pairs_of<Kind::kSigned>(lines[sub / 2], tile), sub);
        for (int r = 0; r < Rows; ++r) {
          total[r][tile] = _mm512_add_epi32(total[r][tile], _mm512_mullo_epi32(part[r][tile], scale));
        }
      }
    }
#pragma GCC unroll 2
    for (int tile = 0; tile < 2; ++tile) {
      const __m512 d = halves(b + tile * 32);
      __m512 dmin = d;
      if (Kind::kHasMins) dmin = halves(b + 64 + tile * 32);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const BlockActivations& x = a[r][block];
        __m512i beside = _mm512_setzero_si512();  // sums of activations times mins, or times scales
        for (int i = 0; i < (Kind::kHasMins ? 4 : 8); ++i) {
          const void* sums = Kind::kHasMins ? x.sum32 + 2 * i : x.sum16 + 2 * i;
          beside = _mm512_dpwssd_epi32(beside, pairs_of<Kind::kSigned>(lines[Kind::kHasMins ? 4 + i : i], tile),
                                       broadcast4(sums));
        }
        __m512i sum = total[r][tile];
        if (!Kind::kHasMins) sum = _mm512_sub_epi32(sum, _mm512_slli_epi32(beside, 5));
        __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), d);
        if (Kind::kHasMins) value = _mm512_sub_ps(value, _mm512_mul_ps(_mm512_cvtepi32_ps(beside), dmin));
        result[r][tile] = _mm512_add_ps(result[r][tile], _mm512_mul_ps(value, _mm512_set1_ps(x.scale)));
      }
    }
  }
  float* c = static_cast<float*>(args.c) + first_row * kStripCols;
  for (int r = 0; r < Rows; ++r) {
    for (int tile = 0; tile < 2; ++tile) _mm512_storeu_ps(c + r * kStripCols + tile * 16, result[r][tile]);
  }
}

// Q8_0: a float scale for every 32 inputs; the weights are the unsigned side (w + 128), as in int8.
template <int Rows>
inline void dot_q8(const VecArgs& args, int first_row) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const BlockActivations* a[Rows];
  __m512 result[Rows][2];
  for (int r = 0; r < Rows; ++r) {
    a[r] = reinterpret_cast<const BlockActivations*>(static_cast<const char*>(args.a) +
                                                     static_cast<size_t>(first_row + r) * args.a_stride);
    result[r][0] = result[r][1] = _mm512_setzero_ps();
  }
  const uint8_t* b = args.b;
  for (int step = 0; step < args.k_steps; ++step, b += kQ8_0Bytes) {
    for (int i = 0; i < kQ8_0Bytes / 64; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(b + kPrefetchBytes + i * 64), _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (int sub = 0; sub < 2; ++sub) {
      const int at = step % 4 * 64 + sub * 32;
      __m512i part[Rows][2];
      for (int r = 0; r < Rows; ++r) {
        part[r][0] = part[r][1] = _mm512_set1_epi32(-128 * a[r][step / 4].sum32[at / 32]);
      }
#pragma GCC unroll 8
      for (int line = 0; line < 8; ++line) {
        const uint8_t* from = b + kQ8_0CodesOffset + (sub * 8 + line) * 64;
        const __m512i b0 = _mm512_xor_si512(line_at(from), flip);
        const __m512i b1 = _mm512_xor_si512(line_at(from + kTileBytes), flip);
        for (int r = 0; r < Rows; ++r) {
          const __m512i four = broadcast4(a[r][step / 4].q + at + line * 4);
          part[r][0] = _mm512_dpbusd_epi32(part[r][0], b0, four);
          part[r][1] = _mm512_dpbusd_epi32(part[r][1], b1, four);
        }
      }
      for (int tile = 0; tile < 2; ++tile) {
        const __m512 d = halves(b + sub * 64 + tile * 32);
        for (int r = 0; r < Rows; ++r) {
          const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(part[r][tile]), d);
          result[r][tile] = _mm512_add_ps(result[r][tile], _mm512_mul_ps(value, _mm512_set1_ps(a[r][step / 4].scale)));
        }
      }
    }
  }
  float* c = static_cast<float*>(args.c) + first_row * kStripCols;
  for (int r = 0; r < Rows; ++r) {
    for (int tile = 0; tile < 2; ++tile) _mm512_storeu_ps(c + r * kStripCols + tile * 16, result[r][tile]);
  }
}

template <typename Kind>
void vec_k(const VecArgs& args) {
  int r = 0;
  for (; r + 4 <= args.rows; r += 4) dot_blocks<Kind, 4>(args, r);
  if (r + 2 <= args.rows) dot_blocks<Kind, 2>(args, r), r += 2;
  if (r < args.rows) dot_blocks<Kind, 1>(args, r);
}

void vec_q8(const VecArgs& args) {
  int r = 0;
  for (; r + 4 <= args.rows; r += 4) dot_q8<4>(args, r);
  if (r + 2 <= args.rows) dot_q8<2>(args, r), r += 2;
  if (r < args.rows) dot_q8<1>(args, r);
}

void vec(BlockKind kind, const VecArgs& args) {
  if (kind == BlockKind::kQ4K) {
    vec_k<Q4K>(args);
  } else if (kind == BlockKind::kQ5K) {
    vec_k<Q5K>(args);
  } else if (kind == BlockKind::kQ6K) {
    vec_k<Q6K>(args);
  } else {
    vec_q8(args);
  }
}

// A 16-bit number in both halves of every column's lane.
inline __m512i both_halves(__m512i v) {
  return _mm512_or_si512(_mm512_and_si512(v, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(v, 16));
}

// (code * step + offset) >> 8 in every byte; code: unsigned bytes. All modulo 2^16: only the result has to fit.
inline __m512i rescaled(__m512i codes, __m512i step, __m512i offset) {
  const __m512i even = _mm512_and_si512(codes, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16(codes, 8);
  const __m512i low = _mm512_srli_epi16(_mm512_add_epi16(_mm512_mullo_epi16(even, step), offset), 8);
  const __m512i high = _mm512_add_epi16(_mm512_mullo_epi16(odd, step), offset);
  return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi16(static_cast<short>(0xff00)),
                                   0xf8);  // low | (high & mask)
}

// 256 / row_scale of 16 columns; 0 for a row of zeros.
inline __m512 units_of(const float* row_scale) {
  const __m512 scale = _mm512_loadu_ps(row_scale);
  return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_NEQ_OQ), _mm512_set1_ps(256.0f),
                             scale);
}

template <typename Kind>
void expand_k(const uint8_t* b, int k_steps, const float* row_scale, uint8_t* out) {
  const __m512i half = _mm512_set1_epi32(128);
  const __m512 units[2] = {units_of(row_scale), units_of(row_scale + 16)};
  for (int block = 0; block < k_steps / 4; ++block, b += Kind::kBytes, out += 4 * kStripStepBytes) {
    __m512i lines[8];
    Kind::scales(b, lines);
#pragma GCC unroll 2
    for (int tile = 0; tile < 2; ++tile) {
      const __m512 d = _mm512_mul_ps(halves(b + tile * 32), units[tile]);
      __m512 dmin = d;
      if (Kind::kHasMins) dmin = _mm512_mul_ps(halves(b + 64 + tile * 32), units[tile]);
#pragma GCC unroll 16
      for (int sub = 0; sub < Kind::kSubs; ++sub) {
        const __m512i scale = scale_of(pairs_of<Kind::kSigned>(lines[sub / 2], tile), sub);
        const __m512i step = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(scale), d));
        __m512i offset;
        if (Kind::kHasMins) {
          const __m512i min = scale_of(pairs_of<false>(lines[Kind::kHasMins ? 4 + sub / 2 : 0], tile), sub);
          offset = _mm512_sub_epi32(half, _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(min), dmin)));
        } else {
          offset = _mm512_sub_epi32(half, _mm512_slli_epi32(step, 5));
        }
        const __m512i step16 = both_halves(step), offset16 = both_halves(offset);
        const int first = sub * Kind::kLines;  // line of the block: 16 to a k-step
        uint8_t* to = out + first / 16 * kStripStepBytes + tile * kTileBytes + first % 16 * 64;
#pragma GCC unroll 8
        for (int line = 0; line < Kind::kLines; ++line) {
          _mm512_storeu_si512(to + line * 64, rescaled(Kind::codes(b, sub, tile, line), step16, offset16));
        }
      }
    }
  }
}

void expand_q8(const uint8_t* b, int k_steps, const float* row_scale, uint8_t* out) {
  const __m512 units[2] = {units_of(row_scale), units_of(row_scale + 16)};
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80)), half = _mm512_set1_epi32(128);
  for (int k = 0; k < k_steps; ++k, b += kQ8_0Bytes, out += kStripStepBytes) {
    for (int tile = 0; tile < 2; ++tile) {
      for (int sub = 0; sub < 2; ++sub) {
        const __m512i step = _mm512_cvtps_epi32(_mm512_mul_ps(halves(b + sub * 64 + tile * 32), units[tile]));
        const __m512i step16 = both_halves(step);
        const __m512i offset16 =
            both_halves(_mm512_sub_epi32(half, _mm512_slli_epi32(step, 7)));  // the codes are + 128
#pragma GCC unroll 8
        for (int line = sub * 8; line < sub * 8 + 8; ++line) {
          const __m512i codes = _mm512_xor_si512(line_at(b + kQ8_0CodesOffset + tile * kTileBytes + line * 64), flip);
          _mm512_storeu_si512(out + tile * kTileBytes + line * 64, rescaled(codes, step16, offset16));
        }
      }
    }
  }
}

void expand_s8(BlockKind kind, const uint8_t* strip, int k_steps, const float* row_scale, uint8_t* out) {
  if (kind == BlockKind::kQ4K) {
    expand_k<Q4K>(strip, k_steps, row_scale, out);
  } else if (kind == BlockKind::kQ5K) {
    expand_k<Q5K>(strip, k_steps, row_scale, out);
  } else if (kind == BlockKind::kQ6K) {
    expand_k<Q6K>(strip, k_steps, row_scale, out);
  } else {
    expand_q8(strip, k_steps, row_scale, out);
  }
}

}  // namespace

extern const BlockTable kAvx512Blocks = {quantize_blocks<float, quantize_block<float>>,
                                         quantize_blocks<uint16_t, quantize_block<uint16_t>>, vec, expand_s8};

}  // namespace kt
