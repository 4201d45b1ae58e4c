// Block formats with AVX2: maddubs of unsigned codes and signed activations, summed in 16 bits as long as they fit, then one
// 16-bit multiply by the sub-block's scale into 32 bits.
#include <immintrin.h>

#include <cmath>

#include "blocks.h"

namespace kt {
namespace {

constexpr int kQuarters = 4;  // 8-column quarters of the 32 columns of a strip
constexpr int kPrefetchBytes = 4096;

inline __m256i load32(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

inline __m256i lane_mask(int left) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline __m256 load8(const float* x, int left) {
  return left >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, lane_mask(left));
}

inline __m256 load8(const uint16_t* x, int left) {
  uint16_t padded[8] = {};
  if (left < 8) {
    for (int i = 0; i < left; ++i) padded[i] = x[i];
    x = padded;
  }
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline int lanes_left(size_t n, size_t i) { return n - i >= 8 ? 8 : static_cast<int>(n - i); }

template <typename T>
inline void quantize_block(const T* x, size_t n, BlockActivations* out) {
  __m256i largest = _mm256_setzero_si256();
  for (size_t i = 0; i < n; i += 8) {
    const __m256i bits = _mm256_castps_si256(load8(x + i, lanes_left(n, i)));
    largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  }
  uint32_t lanes[8], bits = 0;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), largest);
  for (uint32_t lane : lanes) bits = lane > bits ? lane : bits;
  float amax;
  __builtin_memcpy(&amax, &bits, sizeof amax);
  const bool finite = bits < 0x7f800000u, zero = !finite || amax < 1e-30f;
  const __m256 inverse = _mm256_set1_ps(zero ? 0.0f : 127.0f / amax);
  int sums[kBlockInputs / 16] = {};
  for (size_t i = 0; i < kBlockInputs; i += 8) {
    int32_t values[8] = {};
    if (i < n && !zero) {
      const __m256 value = _mm256_mul_ps(load8(x + i, lanes_left(n, i)), inverse);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm256_cvtps_epi32(value));
    }
    for (int l = 0; l < 8; ++l) {
      out->q[i + l] = static_cast<int8_t>(values[l]);
      sums[i / 16] += values[l];
    }
  }
  for (int i = 0; i < kBlockInputs / 16; ++i) out->sum16[i] = static_cast<int16_t>(sums[i]);
  for (int i = 0; i < kBlockInputs / 32; ++i) out->sum32[i] = static_cast<int16_t>(sums[2 * i] + sums[2 * i + 1]);
  out->scale = finite ? (zero ? 0.0f : amax / 127.0f) : NAN;
}

inline __m256i broadcast4(const void* at) {
  int32_t four;
  __builtin_memcpy(&four, at, 4);
  return _mm256_set1_epi32(four);
}

inline __m256 halves(const uint8_t* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

inline __m256i low4(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline __m256i high4(__m256i v) { return low4(_mm256_srli_epi16(v, 4)); }

// Where 8 columns' part of a line lies among lines of 64 bytes, tiles of 8 lines.
inline size_t part_of(int quarter, int line) {
  return static_cast<size_t>(quarter / 2 * 512 + line * 64 + quarter % 2 * 32);
}

// The eight lines of scales and mins that six lines hold, as bytes.
inline void six_bit_lines(const uint8_t* block, uint8_t* out) {
  const __m256i mask = _mm256_set1_epi8(63), two = _mm256_set1_epi8(3);
  for (int half = 0; half < 64; half += 32) {
    __m256i packed[6];
    for (int i = 0; i < 6; ++i) {
      packed[i] = load32(block + kScaleLinesOffset + i * 64 + half);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * 64 + half), _mm256_and_si256(packed[i], mask));
    }
    for (int i = 0; i < 2; ++i) {
      const __m256i a = _mm256_and_si256(_mm256_srli_epi16(packed[3 * i], 6), two);
      const __m256i b = _mm256_and_si256(_mm256_srli_epi16(packed[3 * i + 1], 6), two);
      const __m256i c = _mm256_and_si256(_mm256_srli_epi16(packed[3 * i + 2], 6), two);
      const __m256i all = _mm256_or_si256(a, _mm256_or_si256(_mm256_slli_epi16(b, 2), _mm256_slli_epi16(c, 4)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (6 + i) * 64 + half), all);
    }
  }
}

// kFlush: lines whose pair sums fit in 16 bits: 2 * 127 * largest code * kFlush < 32768.
struct Q4K {
  static constexpr int kBytes = kQ4KBytes, kSubs = 8, kLines = 8, kFlush = 8;
  static constexpr bool kHasMins = true, kSigned = false;
  static inline __m256i codes(const uint8_t* block, int sub, int quarter, int line) {
    const __m256i both = load32(block + kBlockHeaderBytes + sub / 2 * 1024 + part_of(quarter, line));
    return sub % 2 ? high4(both) : low4(both);
  }
};

struct Q5K {
  static constexpr int kBytes = kQ5KBytes, kSubs = 8, kLines = 8, kFlush = 4;
  static constexpr bool kHasMins = true, kSigned = false;
  static inline __m256i codes(const uint8_t* block, int sub, int quarter, int line) {
    const __m256i both = load32(block + kQ5KCodesOffset + sub / 2 * 1024 + part_of(quarter, line));
    const __m256i bits = load32(block + kBlockHeaderBytes + part_of(quarter, line));
    const __m256i fifth = sub < 4 ? _mm256_slli_epi16(bits, 4 - sub) : _mm256_srli_epi16(bits, sub - 4);
    return _mm256_or_si256(sub % 2 ? high4(both) : low4(both), _mm256_and_si256(fifth, _mm256_set1_epi8(16)));
  }
};

struct Q6K {
  static constexpr int kBytes = kQ6KBytes, kSubs = 16, kLines = 4, kFlush = 2;
  static constexpr bool kHasMins = false, kSigned = true;
  static inline __m256i codes(const uint8_t* block, int sub, int quarter, int line) {
    const uint8_t* half = block + kQ6KHalvesOffset + sub / 8 * kQ6KHalfBytes + part_of(quarter, sub % 2 * 4 + line);
    const int inputs = sub % 8 / 2;  // 32 inputs of the half: 0, 1 in low nibbles, 2, 3 in high ones
    const __m256i both = load32(half + 1024 + inputs % 2 * 1024), bits = load32(half);
    const __m256i upper = inputs == 0   ? _mm256_slli_epi16(bits, 4)
                          : inputs == 1 ? _mm256_slli_epi16(bits, 2)
                          : inputs == 2 ? bits
                                        : _mm256_srli_epi16(bits, 2);
    return _mm256_or_si256(inputs < 2 ? low4(both) : high4(both), _mm256_and_si256(upper, _mm256_set1_epi8(48)));
  }
};

// Two values of each of 8 columns side by side in 16 bits.
template <bool Signed>
inline __m256i pairs_of(const uint8_t* lines, int line, int quarter) {
  const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lines + line * 64 + quarter * 16));
  return Signed ? _mm256_cvtepi8_epi16(part) : _mm256_cvtepu8_epi16(part);
}

// The scale of sub-block `sub` from its pair, in both halves of the lane.
inline __m256i scale_of(__m256i pair, int sub) {
  if (sub % 2) {
    const __m256i odd = _mm256_srli_epi32(pair, 16);
    return _mm256_or_si256(odd, _mm256_slli_epi32(odd, 16));
  }
  const __m256i even = _mm256_slli_epi32(pair, 16);
  return _mm256_or_si256(even, _mm256_srli_epi32(even, 16));
}

template <typename Kind, int Rows>
inline void dot_blocks(const VecArgs& args, int first_row) {
  const BlockActivations* a[Rows];
  float* c = static_cast<float*>(args.c) + first_row * kStripCols;
  for (int r = 0; r < Rows; ++r) {
    a[r] = reinterpret_cast<const BlockActivations*>(static_cast<const char*>(args.a) +
                                                     static_cast<size_t>(first_row + r) * args.a_stride);
    for (int i = 0; i < kStripCols; ++i) c[r * kStripCols + i] = 0.0f;
  }
  const uint8_t* b = args.b;
  const int blocks = args.k_steps / 4;
  for (int block = 0; block < blocks; ++block, b += Kind::kBytes) {
    uint8_t unpacked[512];
    const uint8_t* lines = b + kQ6KScalesOffset;
    if (Kind::kHasMins) {
      six_bit_lines(b, unpacked);
      lines = unpacked;
    }
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      constexpr int kLinesPerQuarter = Kind::kBytes / 64 / kQuarters;
      for (int i = 0; i < kLinesPerQuarter; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(b + kPrefetchBytes + (quarter * kLinesPerQuarter + i) * 64),
                     _MM_HINT_T0);
      }
      __m256i total[Rows];
      for (int r = 0; r < Rows; ++r) total[r] = _mm256_setzero_si256();
#pragma GCC unroll 16
      for (int sub = 0; sub < Kind::kSubs; ++sub) {
        const __m256i scale = scale_of(pairs_of<Kind::kSigned>(lines, sub / 2, quarter), sub);
        for (int begin = 0; begin < Kind::kLines; begin += Kind::kFlush) {
          __m256i part[Rows];
          for (int r = 0; r < Rows; ++r) part[r] = _mm256_setzero_si256();
          for (int line = begin; line < begin + Kind::kFlush; ++line) {
            const __m256i codes = Kind::codes(b, sub, quarter, line);
            for (int r = 0; r < Rows; ++r) {
              const __m256i four = broadcast4(a[r][block].q + (sub * Kind::kLines + line) * 4);
              part[r] = _mm256_add_epi16(part[r], _mm256_maddubs_epi16(codes, four));
            }
          }
          for (int r = 0; r < Rows; ++r) total[r] = _mm256_add_epi32(total[r], _mm256_madd_epi16(part[r], scale));
        }
      }
      const __m256 d = halves(b + quarter * 16);
      for (int r = 0; r < Rows; ++r) {
        const BlockActivations& x = a[r][block];
        __m256i beside = _mm256_setzero_si256();  // sums of activations times mins, or times scales
        for (int i = 0; i < (Kind::kHasMins ? 4 : 8); ++i) {
          const void* sums = Kind::kHasMins ? x.sum32 + 2 * i : x.sum16 + 2 * i;
          const __m256i pair = pairs_of<Kind::kSigned>(lines, Kind::kHasMins ? 4 + i : i, quarter);
          beside = _mm256_add_epi32(beside, _mm256_madd_epi16(pair, broadcast4(sums)));
        }
        __m256i sum = total[r];
        if (!Kind::kHasMins) sum = _mm256_sub_epi32(sum, _mm256_slli_epi32(beside, 5));
        __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), d);
        if (Kind::kHasMins) {
          value = _mm256_sub_ps(value, _mm256_mul_ps(_mm256_cvtepi32_ps(beside), halves(b + 64 + quarter * 16)));
        }
        float* at = c + r * kStripCols + quarter * 8;
        _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), _mm256_mul_ps(value, _mm256_set1_ps(x.scale))));
      }
    }
  }
}

template <int Rows>
inline void dot_q8(const VecArgs& args, int first_row) {
  const BlockActivations* a[Rows];
  __m256 result[Rows][kQuarters];
  for (int r = 0; r < Rows; ++r) {
    a[r] = reinterpret_cast<const BlockActivations*>(static_cast<const char*>(args.a) +
                                                     static_cast<size_t>(first_row + r) * args.a_stride);
    for (int quarter = 0; quarter < kQuarters; ++quarter) result[r][quarter] = _mm256_setzero_ps();
  }
  const uint8_t* b = args.b;
  for (int step = 0; step < args.k_steps; ++step, b += kQ8_0Bytes) {
    for (int i = 0; i < kQ8_0Bytes / 64; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(b + kPrefetchBytes + i * 64), _MM_HINT_T0);
    }
    for (int sub = 0; sub < 2; ++sub) {
      const int at = step % 4 * 64 + sub * 32;
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        const uint8_t* from = b + kQ8_0CodesOffset + quarter / 2 * kTileBytes + quarter % 2 * 32 + sub * 512;
        __m256i part[Rows];
        for (int r = 0; r < Rows; ++r) part[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int line = 0; line < 8; ++line) {
          const __m256i weights = load32(from + line * 64), magnitude = _mm256_abs_epi8(weights);
          for (int r = 0; r < Rows; ++r) {
            const __m256i four = _mm256_sign_epi8(broadcast4(a[r][step / 4].q + at + line * 4), weights);
            const __m256i pairs = _mm256_maddubs_epi16(magnitude, four);
            part[r] = _mm256_add_epi32(part[r], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
          }
        }
        const __m256 d = halves(b + sub * 64 + quarter * 16);
        for (int r = 0; r < Rows; ++r) {
          const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(part[r]), d);
          result[r][quarter] =
              _mm256_add_ps(result[r][quarter], _mm256_mul_ps(value, _mm256_set1_ps(a[r][step / 4].scale)));
        }
      }
    }
  }
  float* c = static_cast<float*>(args.c) + first_row * kStripCols;
  for (int r = 0; r < Rows; ++r) {
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      _mm256_storeu_ps(c + r * kStripCols + quarter * 8, result[r][quarter]);
    }
  }
}

template <typename Kind>
void vec_k(const VecArgs& args) {
  int r = 0;
  for (; r + 4 <= args.rows; r += 4) dot_blocks<Kind, 4>(args, r);
  if (r + 2 <= args.rows) dot_blocks<Kind, 2>(args, r), r += 2;
  if (r < args.rows) dot_blocks<Kind, 1>(args, r);
}

void vec(BlockKind kind, const VecArgs& args) {
  if (kind == BlockKind::kQ4K) {
    vec_k<Q4K>(args);
  } else if (kind == BlockKind::kQ5K) {
    vec_k<Q5K>(args);
  } else if (kind == BlockKind::kQ6K) {
    vec_k<Q6K>(args);
  } else {
    int r = 0;
    for (; r + 2 <= args.rows; r += 2) dot_q8<2>(args, r);
    if (r < args.rows) dot_q8<1>(args, r);
  }
}

}  // namespace

extern const BlockTable kAvx2Blocks = {quantize_blocks<float, quantize_block<float>>,
                                       quantize_blocks<uint16_t, quantize_block<uint16_t>>, vec, nullptr};

}  // namespace kt
