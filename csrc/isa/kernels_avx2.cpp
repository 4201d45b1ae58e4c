// AVX2 kernels for CPUs without AVX-512: int8 dot products by maddubs, float FMA for bf16 weights.
//
// maddubs multiplies unsigned by signed bytes and adds pairs in 16 bits with saturation. |w| (at most 128) is the
// unsigned side and the activation with the sign of w the signed one: 2 * 128 * 127 = 32512 < 32768, so it never saturates.
// int4 codes are unsigned as they are and so small that eight such pairs fit 16 bits: dot_s4.
#include <immintrin.h>

#include <cmath>

#include "cpu_features.h"
#include "kernels.h"

namespace kt {
namespace {

constexpr uint64_t kRequired = 0
#ifdef __AVX2__
                               | kAvx2
#endif
#ifdef __FMA__
                               | kFma
#endif
#ifdef __F16C__
                               | kF16c
#endif
    ;

constexpr int kHalves = 4;  // 8-column halves of the 32 columns of a strip
constexpr int kPrefetchBytes = 4096;
constexpr int kBlockSteps = 8;  // k-steps of int4 codes (9 KiB) that stay in L1 while all rows pass over them

inline const uint8_t* half_line(const uint8_t* step, int line, int half) {
  return step + (half / 2) * kTileBytes + line * 64 + (half % 2) * 32;
}

// Lanes i of `left` that exist, as a mask for maskload and maskstore.
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
inline void quantize_row(const T* x, size_t n, size_t padded, int8_t* q, float* scale, int32_t* sum) {
  // |x| compared as integers: NaN and inf come out above every finite number.
  __m256i largest = _mm256_setzero_si256();
  for (size_t i = 0; i < n; i += 8) {
    const __m256i bits = _mm256_castps_si256(load8(x + i, lanes_left(n, i)));
    largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  }
  uint32_t lanes[8], largest_bits = 0;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), largest);
  for (uint32_t lane : lanes) largest_bits = lane > largest_bits ? lane : largest_bits;
  float amax;
  __builtin_memcpy(&amax, &largest_bits, sizeof amax);
  const bool finite = largest_bits < 0x7f800000u;
  const bool zero = !finite || amax < 1e-30f;
  const __m256 scaled_by = _mm256_set1_ps(zero ? 0.0f : 127.0f / amax);
  int32_t total = 0;
  for (size_t i = 0; i < padded; i += 8) {
    int32_t values[8] = {};
    if (i < n && !zero) {
      const __m256 value = _mm256_mul_ps(load8(x + i, lanes_left(n, i)), scaled_by);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm256_cvtps_epi32(value));
    }
    for (int l = 0; l < 8; ++l) {
      q[i + l] = static_cast<int8_t>(values[l]);
      total += values[l];
    }
  }
  *sum = total;
  *scale = finite ? (zero ? 0.0f : amax / 127.0f) : NAN;
}

void quantize_f32(const float* x, size_t n, size_t padded, int8_t* q, float* scale, int32_t* sum) {
  quantize_row(x, n, padded, q, scale, sum);
}

void quantize_bf16(const uint16_t* x, size_t n, size_t padded, int8_t* q, float* scale, int32_t* sum) {
  quantize_row(x, n, padded, q, scale, sum);
}

inline __m256i broadcast4(const int8_t* a) {
  int32_t four;
  __builtin_memcpy(&four, a, 4);
  return _mm256_set1_epi32(four);
}

inline __m256i dot4(__m256i acc, __m256i weights, __m256i magnitude, __m256i activations) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(activations, weights));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Rows x (8 * Halves) columns of a strip over all k-steps. Halves is 4 or 2: then `first_half` is 0 or 2.
template <int Rows, int Halves>
inline void dot_s8(const VecArgs& args, int first_row, int first_half) {
  const int8_t* a = static_cast<const int8_t*>(args.a) + first_row * args.a_stride;
  int32_t* c = static_cast<int32_t*>(args.c) + first_row * kStripCols + first_half * 8;
  __m256i acc[Rows][Halves];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int h = 0; h < Halves; ++h) {
      acc[r][h] = args.accumulate ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + r * kStripCols + h * 8))
                                  : _mm256_setzero_si256();
    }
  }
  const uint8_t* b = args.b;
  for (int step = 0; step < args.k_steps; ++step, b += kStripStepBytes) {
#pragma GCC unroll 4
    for (int k4 = 0; k4 < 16; ++k4) {
#pragma GCC unroll 4
      for (int h = 0; h < Halves; ++h) {
        const uint8_t* line = half_line(b, k4, first_half + h);
        if (h % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
        const __m256i weights = _mm256_load_si256(reinterpret_cast<const __m256i*>(line));
        const __m256i magnitude = _mm256_abs_epi8(weights);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          acc[r][h] = dot4(acc[r][h], weights, magnitude, broadcast4(a + r * args.a_stride + step * 64 + k4 * 4));
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int h = 0; h < Halves; ++h) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + r * kStripCols + h * 8), acc[r][h]);
    }
  }
}

void vec_s8(const VecArgs& args) {
  int r = 0;
  for (; r + 4 <= args.rows; r += 4) {
    dot_s8<4, 2>(args, r, 0);
    dot_s8<4, 2>(args, r, 2);
  }
  if (r + 2 <= args.rows) dot_s8<2, 4>(args, r, 0), r += 2;
  if (r < args.rows) dot_s8<1, 4>(args, r, 0);
}

// s in both bytes of every 16-bit lane's column and z per byte, for 8 columns of a group.
struct GroupPart {
  __m256i scale;
  __m256i zero;
};

inline GroupPart load_group(const uint8_t* header, int half) {
  const __m256i s = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(header + half * 8)));
  const __m256i z =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(header + kStripCols + half * 8)));
  return {_mm256_or_si256(s, _mm256_slli_epi32(s, 16)), _mm256_mullo_epi32(z, _mm256_set1_epi32(0x01010101))};
}

// (code0 + 256 * code1) * s does not carry: s * code <= 240.
inline __m256i expand(__m256i codes, const GroupPart& group) {
  return _mm256_sub_epi8(_mm256_mullo_epi16(codes, group.scale), group.zero);
}

void unpack_s4(const uint8_t* strip, int k_steps, int k_group, uint8_t* out) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const int block_steps = int4_block_steps(k_group);
  const int high_header = (int4_headers(k_group) - 1) * kInt4HeaderBytes;
  for (int step = 0; step < k_steps; strip += int4_block_bytes(k_group)) {
    const uint8_t* codes = strip + high_header + kInt4HeaderBytes;
    const int end = step + block_steps < k_steps ? step + block_steps : k_steps;
    for (; step < end; ++step, codes += kTileBytes, out += kStripStepBytes) {
      for (int h = 0; h < kHalves; ++h) {
        const GroupPart low = load_group(strip, h), high = load_group(strip + high_header, h);
        for (int i = 0; i < 8; ++i) {
          const uint8_t* from = codes + (h / 2) * 512 + i * 64 + (h % 2) * 32;
          const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
          uint8_t* to = out + (h / 2) * kTileBytes + i * 64 + (h % 2) * 32;
          _mm256_store_si256(reinterpret_cast<__m256i*>(to), expand(_mm256_and_si256(packed, nibble), low));
          _mm256_store_si256(reinterpret_cast<__m256i*>(to + 8 * 64),
                             expand(_mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble), high));
        }
      }
    }
  }
}

// s in both 16-bit lanes of a column and z in the low one, as madd wants them.
struct DotGroup {
  __m256i scale;
  __m256i zero;
};

inline DotGroup load_dot_group(const uint8_t* header, int half) {
  const __m256i s = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(header + half * 8)));
  return {_mm256_or_si256(s, _mm256_slli_epi32(s, 16)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(header + kStripCols + half * 8)))};
}

// Of 64 activations the sum of all, or of the first and of the last 32, in every 32-bit lane.
struct HalfSums {
  __m256i low, high;
};

inline __m256i pair_sums(const int8_t* a) {
  return _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
}

// The sum of 16-bit lanes, in every 32-bit lane.
inline __m256i sum_lanes(__m256i lanes) {
  __m256i sum = _mm256_madd_epi16(lanes, _mm256_set1_epi16(1));
  sum = _mm256_add_epi32(sum, _mm256_permute2x128_si256(sum, sum, 1));
  sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0x4e));
  return _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0xb1));
}

// One k-step of Rows x 32 columns added to c. HasTwo: its halves are groups of their own. The dot product of a group is s * sum(code * a) - z * sum(a): maddubs sums
// pairs of code * a in 16 bits, at most 2 * 15 * 127 = 3810, and the eight of half a k-step reach 30480 < 32768; then madd
// multiplies them by s and widens. |sum(a)| <= 64 * 127 and z <= 128 fit 16 bits too, so all of it is exact.
template <int Rows, bool HasTwo>
inline void dot_s4_step(const int8_t* a, size_t a_stride, const uint8_t* low_header, const uint8_t* high_header,
                        const uint8_t* codes, int32_t* c) {
  const __m256i nibble = _mm256_set1_epi8(15);
  HalfSums sums[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const __m256i low = pair_sums(a + r * a_stride), high = pair_sums(a + r * a_stride + 32);
    sums[r].low = sum_lanes(HasTwo ? low : _mm256_add_epi16(low, high));
    if (HasTwo) sums[r].high = sum_lanes(high);
  }
  for (int h = 0; h < kHalves; ++h) {
    const uint8_t* line = codes + (h / 2) * 512 + (h % 2) * 32;
    __m256i low[Rows], high[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) low[r] = high[r] = _mm256_setzero_si256();
#pragma GCC unroll 1  // unrolled, gcc 12 regroups the sums and keeps an address for every load: 1.6 times as slow
    for (int i = 0; i < 8; ++i) {
      if (h % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(line + i * 64 + kPrefetchBytes), _MM_HINT_T0);
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + i * 64));
      __m256i part = _mm256_and_si256(packed, nibble);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
        low[r] = _mm256_add_epi16(low[r], _mm256_maddubs_epi16(part, broadcast4(a + r * a_stride + i * 4)));
      // No load of the second half may move up: all at once they do not fit the 16 registers.
      asm volatile("" ::: "memory");
      part = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
        high[r] = _mm256_add_epi16(high[r], _mm256_maddubs_epi16(part, broadcast4(a + r * a_stride + i * 4 + 32)));
    }
    const DotGroup low_group = load_dot_group(low_header, h);
    const DotGroup high_group = HasTwo ? load_dot_group(high_header, h) : low_group;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      __m256i* at = reinterpret_cast<__m256i*>(c + r * kStripCols + h * 8);
      __m256i dots =
          _mm256_add_epi32(_mm256_madd_epi16(low[r], low_group.scale), _mm256_madd_epi16(high[r], high_group.scale));
      dots = _mm256_sub_epi32(dots, _mm256_madd_epi16(low_group.zero, sums[r].low));
      if (HasTwo) dots = _mm256_sub_epi32(dots, _mm256_madd_epi16(high_group.zero, sums[r].high));
      _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), dots));
    }
  }
}

// Rows over k-steps [begin, end), begin at the start of a block of codes.
template <int Rows, bool HasTwo>
void dot_s4(const VecArgs& args, int first_row, int begin, int end) {
  const int block_steps = int4_block_steps(args.k_group);
  const int high_header = HasTwo ? kInt4HeaderBytes : 0;
  const int8_t* a = static_cast<const int8_t*>(args.a) + first_row * args.a_stride;
  int32_t* c = static_cast<int32_t*>(args.c) + first_row * kStripCols;
  if (begin == 0 && !args.accumulate) __builtin_memset(c, 0, Rows * kStripCols * sizeof(int32_t));
  const uint8_t* block = args.b + static_cast<size_t>(begin / block_steps) * int4_block_bytes(args.k_group);
  for (int step = begin; step < end; block += int4_block_bytes(args.k_group)) {
    const uint8_t* codes = block + high_header + kInt4HeaderBytes;
    const int stop = step + block_steps < end ? step + block_steps : end;
    for (; step < stop; ++step, codes += kTileBytes) {
      dot_s4_step<Rows, HasTwo>(a + step * 64, args.a_stride, block, block + high_header, codes, c);
    }
  }
}

template <bool HasTwo>
void dot_s4_rows(const VecArgs& args) {
  for (int step = 0; step < args.k_steps; step += kBlockSteps) {
    const int end = args.k_steps - step < kBlockSteps ? args.k_steps : step + kBlockSteps;
    int r = 0;
    for (; r + 4 <= args.rows; r += 4) dot_s4<4, HasTwo>(args, r, step, end);
    if (r + 2 <= args.rows) dot_s4<2, HasTwo>(args, r, step, end), r += 2;
    if (r < args.rows) dot_s4<1, HasTwo>(args, r, step, end);
  }
}

void vec_s4(const VecArgs& args) {
  int4_headers(args.k_group) == 2 ? dot_s4_rows<true>(args) : dot_s4_rows<false>(args);
}

template <int Rows>
inline void dot_bf16(const VecArgs& args, int first_row) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const float* a[Rows];
  __m256 acc[Rows][kHalves];
  float* c = static_cast<float*>(args.c) + first_row * kStripCols;
  for (int r = 0; r < Rows; ++r) {
    a[r] = reinterpret_cast<const float*>(static_cast<const char*>(args.a) + (first_row + r) * args.a_stride);
    for (int h = 0; h < kHalves; ++h) {
      acc[r][h] = args.accumulate ? _mm256_loadu_ps(c + r * kStripCols + h * 8) : _mm256_setzero_ps();
    }
  }
  const uint8_t* b = args.b;
  for (int step = 0; step < args.k_steps; ++step, b += kStripStepBytes) {
    for (int k2 = 0; k2 < 16; ++k2) {
#pragma GCC unroll 4
      for (int h = 0; h < kHalves; ++h) {
        const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(half_line(b, k2, h)));
        const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
        for (int r = 0; r < Rows; ++r) {
          const float* x = a[r] + step * 32 + k2 * 2;
          acc[r][h] = _mm256_fmadd_ps(even, _mm256_set1_ps(x[0]), acc[r][h]);
          acc[r][h] = _mm256_fmadd_ps(odd, _mm256_set1_ps(x[1]), acc[r][h]);
        }
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int h = 0; h < kHalves; ++h) _mm256_storeu_ps(c + r * kStripCols + h * 8, acc[r][h]);
  }
}

void vec_bf16(const VecArgs& args) {
  int r = 0;
  for (; r + 2 <= args.rows; r += 2) dot_bf16<2>(args, r);
  if (r < args.rows) dot_bf16<1>(args, r);
}

// exp(x) by 2^n * p(r), |r| <= ln2 / 2, degree 6 (Cephes expf coefficients): relative error below 2e-7.
inline __m256 exp8(__m256 x) {
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.3f)), _mm256_set1_ps(88.3f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(_mm256_mul_ps(p, r), r, _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
}

inline __m256 silu8(__m256 x) {
  const __m256 y = _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), exp8(_mm256_sub_ps(_mm256_setzero_ps(), x))));
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));  // max/min above swallow NaN
}

inline __m256 raw8(const int32_t* c) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(c)));
}
inline __m256 raw8(const float* c) { return _mm256_loadu_ps(c); }

template <typename T>
inline __m256 value8(const EpilogueArgs& e, int r, int half) {
  const __m256 raw = raw8(static_cast<const T*>(e.c) + r * kStripCols + half * 8);
  if (!e.scale_a) return raw;
  return _mm256_mul_ps(raw, _mm256_mul_ps(_mm256_set1_ps(e.scale_a[r]), _mm256_loadu_ps(e.scale_b + half * 8)));
}

template <typename T>
void silu_mul(const EpilogueArgs& e) {
  for (int r = 0; r < e.rows; ++r) {
    for (int half = 0; half < 2; ++half) {
      _mm256_storeu_ps(e.h + r * e.h_stride + half * 8,
                       _mm256_mul_ps(silu8(value8<T>(e, r, half)), value8<T>(e, r, half + 2)));
    }
  }
}

// The same columns of another matrix's C, with the same rows.
inline EpilogueArgs up_of(const EpilogueArgs& e) {
  EpilogueArgs up = e;
  up.c = e.c_up;
  up.scale_b = e.scale_b_up;
  return up;
}

template <typename T>
void silu_pair(const EpilogueArgs& e) {
  const EpilogueArgs up = up_of(e);
  for (int r = 0; r < e.rows; ++r) {
    for (int part = 0; part < 4; ++part) {
      _mm256_storeu_ps(e.h + r * e.h_stride + part * 8,
                       _mm256_mul_ps(silu8(value8<T>(e, r, part)), value8<T>(up, r, part)));
    }
  }
}

template <typename T>
void add_weighted(const EpilogueArgs& e) {
  for (int r = 0; r < e.rows; ++r) {
    float* y = static_cast<float*>(e.out) + e.token[r] * e.out_stride;
    const __m256 weight = _mm256_set1_ps(e.weight[r]);
    for (int half = 0; half * 8 < e.cols; ++half) {
      // multiply, then add: the same two roundings as the scalar kernel
      const __m256i mask = lane_mask(e.cols - half * 8);
      const __m256 part = _mm256_mul_ps(weight, value8<T>(e, r, half));
      const __m256 before = e.first[r] ? _mm256_setzero_ps() : _mm256_maskload_ps(y + half * 8, mask);
      _mm256_maskstore_ps(y + half * 8, mask, _mm256_add_ps(before, part));
    }
  }
}

template <typename T>
void store_f32(const EpilogueArgs& e) {
  for (int r = 0; r < e.rows; ++r) {
    float* out = static_cast<float*>(e.out) + r * e.out_stride;
    for (int half = 0; half * 8 < e.cols; ++half) {
      _mm256_maskstore_ps(out + half * 8, lane_mask(e.cols - half * 8), value8<T>(e, r, half));
    }
  }
}

template <typename T>
void store_bf16(const EpilogueArgs& e) {
  for (int r = 0; r < e.rows; ++r) {
    uint16_t* out = static_cast<uint16_t*>(e.out) + r * e.out_stride;
    for (int half = 0; half * 8 < e.cols; ++half) {
      uint32_t bits[8];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits), _mm256_castps_si256(value8<T>(e, r, half)));
      for (int l = 0; l < 8 && half * 8 + l < e.cols; ++l) {
        const bool is_nan = (bits[l] & 0x7fffffffu) > 0x7f800000u;
        out[half * 8 + l] =
            static_cast<uint16_t>(is_nan ? (bits[l] >> 16) | 0x40 : (bits[l] + 0x7fff + ((bits[l] >> 16) & 1)) >> 16);
      }
    }
  }
}

inline __m256i load_half(const uint8_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }

// 4 rows x 16 columns of maddubs, madd and add: what a layout of unsigned weights could reach, without dot4's sign.
uint64_t peak_s8(uint8_t* operands, int iterations) {
  constexpr int kRows = 4, kBytesPerDot = 2 * 32;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[kRows][2];
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  for (int i = 0; i < iterations; ++i) {
    for (const uint8_t* b = operands; b < operands + kPeakOperandBytes; b += kBytesPerDot) {
      const __m256i b0 = load_half(b), b1 = load_half(b + 32);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256i four = broadcast4(reinterpret_cast<const int8_t*>(b) + r * 4);
        acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(_mm256_maddubs_epi16(b0, four), ones));
        acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(_mm256_maddubs_epi16(b1, four), ones));
      }
    }
  }
  for (int i = 0; i < 2 * kRows; ++i) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(operands + kPeakOperandBytes + i * 32), acc[i / 2][i % 2]);
  }
  return static_cast<uint64_t>(iterations) * (kPeakOperandBytes / kBytesPerDot) * kRows * 2 * 32 * 2;
}

// The same shape in float FMA, without the unpacking of bf16.
uint64_t peak_bf16(uint8_t* operands, int iterations) {
  constexpr int kRows = 4, kBytesPerDot = 2 * 32;
  __m256 acc[kRows][2];
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
  for (int i = 0; i < iterations; ++i) {
    for (const uint8_t* b = operands; b < operands + kPeakOperandBytes; b += kBytesPerDot) {
      const __m256 b0 = _mm256_castsi256_ps(load_half(b)), b1 = _mm256_castsi256_ps(load_half(b + 32));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256 one = _mm256_castsi256_ps(broadcast4(reinterpret_cast<const int8_t*>(b) + r * 4));
        acc[r][0] = _mm256_fmadd_ps(b0, one, acc[r][0]);
        acc[r][1] = _mm256_fmadd_ps(b1, one, acc[r][1]);
      }
    }
  }
  for (int i = 0; i < 2 * kRows; ++i) {
    _mm256_store_ps(reinterpret_cast<float*>(operands + kPeakOperandBytes + i * 32), acc[i / 2][i % 2]);
  }
  return static_cast<uint64_t>(iterations) * (kPeakOperandBytes / kBytesPerDot) * kRows * 2 * 8 * 2;
}

}  // namespace

extern const KernelTable kAvx2Table = {
    "avx2",
    kRequired,
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
