// AVX-512 kernels: VNNI dot products for int8 and int4, float FMA for bf16 weights.
//
// VNNI multiplies unsigned by signed bytes. The weights are the unsigned side (w + 128, one xor after the load) and the
// activations the signed, broadcast operand, so the correction is 128 * sum(activations): one number per row, nothing
// per weight, and the accumulator holds the exact signed dot product.
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
#ifdef __AVX512F__
                               | kAvx512f
#endif
#ifdef __AVX512BW__
                               | kAvx512bw
#endif
#ifdef __AVX512DQ__
                               | kAvx512dq
#endif
#ifdef __AVX512VL__
                               | kAvx512vl
#endif
#ifdef __AVX512VNNI__
                               | kAvx512vnni
#endif
    ;

// How far ahead of the weights of one row the memory is asked for. Plain reads with two threads on Granite Rapids: about
// 31 GB/s without prefetch, 35 with 512 bytes to 2 KiB, 31 from 4 KiB on (a shared machine; medians moved by a tenth).
constexpr int kPrefetchBytes = 1024;
// The same for int4: one row, two threads, huge pages: 7.3 ms without; 7.1, 6.9, 6.7, 6.8, 6.9 and 7.2 with 512, 1024, 1536, 2048,
// 3072 and 4096 bytes.
constexpr int kPrefetchCodes = 1536;

inline __m512 load16(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
inline __m512 load16(const uint16_t* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

inline __mmask16 tail_mask(size_t left) { return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }

template <typename T>
inline void quantize_row(const T* x, size_t n, size_t padded, int8_t* q, float* scale, int32_t* sum) {
  // |x| compared as integers: NaN and inf come out above every finite number.
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (size_t i = 0; i < n; i += 16) {
    const __m512i bits = _mm512_castps_si512(load16(x + i, tail_mask(n - i)));
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
  }
  const uint32_t largest_bits = _mm512_reduce_max_epu32(largest);
  const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(largest_bits))));
  const bool finite = largest_bits < 0x7f800000u;
  const bool zero = !finite || amax < 1e-30f;
  const float inverse = zero ? 0.0f : 127.0f / amax;
  const __m512 scaled_by = _mm512_set1_ps(inverse);
  __m512i total = _mm512_setzero_si512();
  for (size_t i = 0; i < padded; i += 16) {
    const __mmask16 mask = i < n && !zero ? tail_mask(n - i) : 0;
    const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(load16(x + i, mask), scaled_by));
    total = _mm512_add_epi32(total, value);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(value));
  }
  *sum = _mm512_reduce_add_epi32(total);
  *scale = finite ? (zero ? 0.0f : amax / 127.0f) : NAN;
}

void quantize_f32(const float* x, size_t n, size_t padded, int8_t* q, float* scale, int32_t* sum) {
  quantize_row(x, n, padded, q, scale, sum);
}

void quantize_bf16(const uint16_t* x, size_t n, size_t padded, int8_t* q, float* scale, int32_t* sum) {
  quantize_row(x, n, padded, q, scale, sum);
}

inline __m512i broadcast4(const int8_t* a) {
  int32_t four;
  __builtin_memcpy(&four, a, 4);
  return _mm512_set1_epi32(four);
}

// Rows of one pass over the weights: 2 x 12 accumulators, two weight vectors and a broadcast fill the 32 registers.
constexpr int kMostRows = 12;
// int4 for more than four rows: K blocks of so many k-steps are expanded on the stack (16 KiB) and stay in L1.
constexpr int kBlockSteps = 8;
// All 16 groups of four inputs of a k-step: a tenth faster than 4. With sanitizers that takes gcc several minutes.
#ifdef __SANITIZE_ADDRESS__
constexpr int kUnroll = 1;
#else
constexpr int kUnroll = 16;
#endif

// Weights + 128 of a line of an int8 strip, or of an expanded block, which holds them so.
template <bool IsFlipped>
inline __m512i load_weights(const uint8_t* line) {
  const __m512i stored = _mm512_load_si512(line);
  return IsFlipped ? stored : _mm512_xor_si512(stored, _mm512_set1_epi8(static_cast<char>(0x80)));
}

// Rows x 32 columns over some k-steps. Parallel: independent accumulator sets per column (few rows would otherwise wait
// for the latency of each dot product). `ahead`: memory wanted soon.
template <bool IsFlipped, int Rows, int Parallel>
inline void dot_s8(const VecArgs& args, int first_row, const uint8_t* ahead) {
  constexpr int kAhead = IsFlipped ? 1 : 2;  // lines of `ahead` with every four inputs: as many as are used up
  const int8_t* a = static_cast<const int8_t*>(args.a) + first_row * args.a_stride;
  int32_t* c = static_cast<int32_t*>(args.c) + first_row * kStripCols;
  __m512i acc[Rows][2][Parallel];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    const __m512i start = _mm512_set1_epi32(args.accumulate ? 0 : -128 * args.sum[first_row + r]);
#pragma GCC unroll 2
    for (int tile = 0; tile < 2; ++tile) {
      acc[r][tile][0] = args.accumulate ? _mm512_loadu_si512(c + r * kStripCols + tile * 16) : start;
#pragma GCC unroll 4
      for (int p = 1; p < Parallel; ++p) acc[r][tile][p] = _mm512_setzero_si512();
    }
  }
  const uint8_t* b = args.b;
  for (int step = 0; step < args.k_steps; ++step, b += kStripStepBytes) {
#pragma GCC unroll kUnroll
    for (int k4 = 0; k4 < 16; ++k4) {
#pragma GCC unroll 2
      for (int i = 0; i < kAhead; ++i, ahead += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
      const __m512i b0 = load_weights<IsFlipped>(b + k4 * 64);
      const __m512i b1 = load_weights<IsFlipped>(b + k4 * 64 + kTileBytes);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
        const __m512i four = broadcast4(a + r * args.a_stride + step * 64 + k4 * 4);
        acc[r][0][k4 % Parallel] = _mm512_dpbusd_epi32(acc[r][0][k4 % Parallel], b0, four);
        acc[r][1][k4 % Parallel] = _mm512_dpbusd_epi32(acc[r][1][k4 % Parallel], b1, four);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int tile = 0; tile < 2; ++tile) {
      __m512i total = acc[r][tile][0];
#pragma GCC unroll 4
      for (int p = 1; p < Parallel; ++p) total = _mm512_add_epi32(total, acc[r][tile][p]);
      _mm512_storeu_si512(c + r * kStripCols + tile * 16, total);
    }
  }
}

template <bool IsFlipped>
void dot_s8_rows(const VecArgs& args, int first_row, int rows, const uint8_t* ahead) {
  switch (rows) {
    case 1:
      return dot_s8<IsFlipped, 1, 4>(args, first_row, ahead);
    case 2:
      return dot_s8<IsFlipped, 2, 4>(args, first_row, ahead);
    case 3:
      return dot_s8<IsFlipped, 3, 2>(args, first_row, ahead);
    case 4:
      return dot_s8<IsFlipped, 4, 2>(args, first_row, ahead);
    case 5:
      return dot_s8<IsFlipped, 5, 2>(args, first_row, ahead);
    case 6:
      return dot_s8<IsFlipped, 6, 1>(args, first_row, ahead);
    case 7:
      return dot_s8<IsFlipped, 7, 1>(args, first_row, ahead);
    case 8:
      return dot_s8<IsFlipped, 8, 1>(args, first_row, ahead);
    case 9:
      return dot_s8<IsFlipped, 9, 1>(args, first_row, ahead);
    case 10:
      return dot_s8<IsFlipped, 10, 1>(args, first_row, ahead);
    case 11:
      return dot_s8<IsFlipped, 11, 1>(args, first_row, ahead);
    default:
      return dot_s8<IsFlipped, kMostRows, 1>(args, first_row, ahead);
  }
}

// Passes of equal height. Between them a strip stays in L2, from where reading it costs nothing that shows: leaving the
// flipped weights of K blocks in L1 for the later passes was slower by a tenth at 16 rows, and no faster at 128.
void vec_s8(const VecArgs& args) {
  const int passes = (args.rows + kMostRows - 1) / kMostRows;
  for (int pass = 0, row = 0; pass < passes; ++pass) {
    const int rows = (args.rows - row) / (passes - pass);
    dot_s8_rows<false>(args, row, rows, args.b + kPrefetchBytes);
    row += rows;
  }
}

// Scales and offsets of one 16-column half of a group, spread so that one 16-bit multiply serves two codes:
// (code0 + 256 * code1) * s never carries, because s * code <= 16 * 15 < 256.
struct GroupHalf {
  __m512i scale;   // s in each 16-bit lane of its column
  __m512i offset;  // added to each byte of its column
};

// 16 unsigned bytes, one a lane.
inline __m512i load_bytes(const uint8_t* at) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

inline GroupHalf load_group(const uint8_t* header, int tile, uint8_t bias) {
  const __m512i s = load_bytes(header + tile * 16);
  const __m512i z = _mm512_cvtepu8_epi32(
      _mm_sub_epi8(_mm_set1_epi8(static_cast<char>(bias)),
                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(header + kStripCols + tile * 16))));
  return {_mm512_or_si512(s, _mm512_slli_epi32(s, 16)), _mm512_mullo_epi32(z, _mm512_set1_epi32(0x01010101))};
}

// s * code + (bias - z) for 64 codes held one per byte.
inline __m512i expand(__m512i codes, const GroupHalf& group) {
  return _mm512_add_epi8(_mm512_mullo_epi16(codes, group.scale), group.offset);
}

inline void prefetch_codes(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchCodes), _MM_HINT_T0);
}

inline __m512i low_codes(__m512i packed) { return _mm512_and_si512(packed, _mm512_set1_epi8(15)); }
inline __m512i high_codes(__m512i packed) { return low_codes(_mm512_srli_epi16(packed, 4)); }

// The codes as int8, with `bias` added modulo 256.
inline void expand_strip(const uint8_t* strip, int k_steps, int k_group, uint8_t bias, uint8_t* out) {
  const int block_steps = int4_block_steps(k_group);
  const int high_header = (int4_headers(k_group) - 1) * kInt4HeaderBytes;
  for (int step = 0; step < k_steps;) {
    const uint8_t* codes = strip + high_header + kInt4HeaderBytes;
    const int end = step + block_steps < k_steps ? step + block_steps : k_steps;
    const GroupHalf low[2] = {load_group(strip, 0, bias), load_group(strip, 1, bias)};
    const GroupHalf high[2] = {load_group(strip + high_header, 0, bias), load_group(strip + high_header, 1, bias)};
    for (; step < end; ++step, codes += kTileBytes, out += kStripStepBytes) {
      for (int tile = 0; tile < 2; ++tile) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const __m512i packed = _mm512_loadu_si512(codes + tile * 512 + i * 64);
          _mm512_store_si512(out + tile * kTileBytes + i * 64, expand(low_codes(packed), low[tile]));
          _mm512_store_si512(out + tile * kTileBytes + (i + 8) * 64, expand(high_codes(packed), high[tile]));
        }
      }
    }
    strip += int4_block_bytes(k_group);
  }
}

void unpack_s4(const uint8_t* strip, int k_steps, int k_group, uint8_t* out) {
  expand_strip(strip, k_steps, k_group, 0, out);
}

// Codes are the unsigned operand as they are, the upper ones 16 times as large; scale and zero of a group are applied to its
// sums: sum(a * (s * code - z)) = s * sum(a * code) - z * sum(a).
template <int Rows, int Headers>
inline void dot_s4(const VecArgs& args) {
  const int8_t* a = static_cast<const int8_t*>(args.a);
  int32_t* c = static_cast<int32_t*>(args.c);
  const int block_steps = int4_block_steps(args.k_group);
  const __m512i low_bits = _mm512_set1_epi8(0x0f), high_bits = _mm512_set1_epi8(static_cast<char>(0xf0));
  __m512i acc[Rows][2];
  for (int r = 0; r < Rows; ++r) {
    for (int tile = 0; tile < 2; ++tile)
      acc[r][tile] = args.accumulate ? _mm512_loadu_si512(c + r * kStripCols + tile * 16) : _mm512_setzero_si512();
  }
  const uint8_t* block = args.b;
  for (int step = 0; step < args.k_steps; step += block_steps, block += int4_block_bytes(args.k_group)) {
    const uint8_t* codes = block + Headers * kInt4HeaderBytes;
    for (int i = 0; i < Headers; ++i) prefetch_codes(block + i * kInt4HeaderBytes);
    __m512i low[Rows][2] = {}, high[Rows][2] = {};
    __m512i sums[Rows] = {};  // of activations, four inputs a lane: inputs of low codes in lanes 0 to 7
    for (int s = step; s < step + block_steps; ++s, codes += kTileBytes) {
      for (int r = 0; r < Rows; ++r) {
        const __m512i all = _mm512_loadu_si512(a + r * args.a_stride + s * 64);
        sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_set1_epi8(1), all);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
        for (int tile = 0; tile < 2; ++tile) {
          const uint8_t* at = codes + tile * 512 + i * 64;
          prefetch_codes(at);
          const __m512i packed = _mm512_loadu_si512(at);
          const __m512i b_low = _mm512_and_si512(packed, low_bits), b_high = _mm512_and_si512(packed, high_bits);
          for (int r = 0; r < Rows; ++r) {
            const int8_t* row = a + r * args.a_stride + s * 64 + i * 4;
            low[r][tile] = _mm512_dpbusd_epi32(low[r][tile], b_low, broadcast4(row));
            high[r][tile] = _mm512_dpbusd_epi32(high[r][tile], b_high, broadcast4(row + 32));
          }
        }
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int tile = 0; tile < 2; ++tile) high[r][tile] = _mm512_srai_epi32(high[r][tile], 4);
    }
#pragma GCC unroll 2
    for (int header = 0; header < Headers; ++header) {
      const __mmask16 lanes = Headers == 1 ? 0xffff : header == 0 ? 0x00ff : 0xff00;
      __m512i sum[Rows];
      for (int r = 0; r < Rows; ++r) sum[r] = _mm512_set1_epi32(_mm512_mask_reduce_add_epi32(lanes, sums[r]));
#pragma GCC unroll 2
      for (int tile = 0; tile < 2; ++tile) {
        const __m512i scale = load_bytes(block + header * kInt4HeaderBytes + tile * 16);
        const __m512i zero = load_bytes(block + header * kInt4HeaderBytes + kStripCols + tile * 16);
        for (int r = 0; r < Rows; ++r) {
          const __m512i dots = Headers == 1  ? _mm512_add_epi32(low[r][tile], high[r][tile])
                               : header == 0 ? low[r][tile]
                                             : high[r][tile];
          acc[r][tile] = _mm512_add_epi32(
              acc[r][tile], _mm512_sub_epi32(_mm512_mullo_epi32(dots, scale), _mm512_mullo_epi32(sum[r], zero)));
        }
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int tile = 0; tile < 2; ++tile) _mm512_storeu_si512(c + r * kStripCols + tile * 16, acc[r][tile]);
  }
}

template <int Rows>
inline void dot_s4(const VecArgs& args) {
  int4_headers(args.k_group) == 1 ? dot_s4<Rows, 1>(args) : dot_s4<Rows, 2>(args);
}

// Up to four rows multiply codes as they are; more share a block of expanded weights in L1.
void vec_s4(const VecArgs& args) {
  switch (args.rows) {
    case 1:
      return dot_s4<1>(args);
    case 2:
      return dot_s4<2>(args);
    case 3:
      return dot_s4<3>(args);
    case 4:
      return dot_s4<4>(args);
    default:
      break;
  }
  alignas(64) uint8_t expanded[kBlockSteps * kStripStepBytes];
  VecArgs part = args;
  part.b = expanded;
  const size_t block_bytes = kBlockSteps / int4_block_steps(args.k_group) * int4_block_bytes(args.k_group);
  const uint8_t* from = args.b;
  for (int step = 0; step < args.k_steps; step += kBlockSteps, from += block_bytes) {
    part.k_steps = args.k_steps - step < kBlockSteps ? args.k_steps - step : kBlockSteps;
    expand_strip(from, part.k_steps, args.k_group, 128, expanded);
    part.a = static_cast<const int8_t*>(args.a) + step * 64;
    part.accumulate = args.accumulate || step > 0;
    // The first pass asks for the codes of the next block, the others for what they have.
    const int passes = (args.rows + kMostRows - 1) / kMostRows;
    for (int pass = 0, row = 0; pass < passes; ++pass) {
      const int rows = (args.rows - row) / (passes - pass);
      dot_s8_rows<true>(part, row, rows, pass ? expanded : from + block_bytes);
      row += rows;
    }
  }
}

template <int Rows>
inline void dot_bf16(const VecArgs& args, int first_row) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const float* a[Rows];
  __m512 acc[Rows][2][2];
  float* c = static_cast<float*>(args.c) + first_row * kStripCols;
  for (int r = 0; r < Rows; ++r) {
    a[r] = reinterpret_cast<const float*>(static_cast<const char*>(args.a) + (first_row + r) * args.a_stride);
    for (int tile = 0; tile < 2; ++tile) {
      acc[r][tile][0] = args.accumulate ? _mm512_loadu_ps(c + r * kStripCols + tile * 16) : _mm512_setzero_ps();
      acc[r][tile][1] = _mm512_setzero_ps();
    }
  }
  const uint8_t* b = args.b;
  for (int step = 0; step < args.k_steps; ++step, b += kStripStepBytes) {
#pragma GCC unroll 4
    for (int k2 = 0; k2 < 16; ++k2) {
#pragma GCC unroll 2
      for (int tile = 0; tile < 2; ++tile) {
        const uint8_t* line = b + tile * kTileBytes + k2 * 64;
        if (Rows <= 2) _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
        const __m512i pairs = _mm512_load_si512(line);
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
        for (int r = 0; r < Rows; ++r) {
          const float* x = a[r] + step * 32 + k2 * 2;
          acc[r][tile][0] = _mm512_fmadd_ps(even, _mm512_set1_ps(x[0]), acc[r][tile][0]);
          acc[r][tile][1] = _mm512_fmadd_ps(odd, _mm512_set1_ps(x[1]), acc[r][tile][1]);
        }
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int tile = 0; tile < 2; ++tile) {
      _mm512_storeu_ps(c + r * kStripCols + tile * 16, _mm512_add_ps(acc[r][tile][0], acc[r][tile][1]));
    }
  }
}

void vec_bf16(const VecArgs& args) {
  int r = 0;
  for (; r + 4 <= args.rows; r += 4) dot_bf16<4>(args, r);
  if (r + 2 <= args.rows) dot_bf16<2>(args, r), r += 2;
  if (r < args.rows) dot_bf16<1>(args, r);
}

// exp(x) by 2^n * p(r), |r| <= ln2 / 2, degree 6 (Cephes expf coefficients): relative error below 2e-7.
inline __m512 exp16(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.3f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 y = _mm512_div_ps(x, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);  // max/min above swallow NaN
}

inline __m512 raw16(const int32_t* c) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(c)); }
inline __m512 raw16(const float* c) { return _mm512_loadu_ps(c); }

template <typename T>
inline __m512 value16(const EpilogueArgs& e, int r, int tile) {
  const __m512 raw = raw16(static_cast<const T*>(e.c) + r * kStripCols + tile * kTileCols);
  if (!e.scale_a) return raw;
  return _mm512_mul_ps(raw, _mm512_mul_ps(_mm512_set1_ps(e.scale_a[r]), _mm512_loadu_ps(e.scale_b + tile * kTileCols)));
}

template <typename T>
void silu_mul(const EpilogueArgs& e) {
  for (int r = 0; r < e.rows; ++r) {
    _mm512_storeu_ps(e.h + r * e.h_stride, _mm512_mul_ps(silu16(value16<T>(e, r, 0)), value16<T>(e, r, 1)));
  }
}

// The same columns of another matrix's C, with the same rows.
inline EpilogueArgs up_of(const EpilogueArgs& e) {
  EpilogueArgs up = e;
  up.c = e.c_up;
  up.scale_b = e.scale_b_up;
  return up;
}

// Past the caches whole lines need not be read before they are written. The thread pool's locked instructions order such
// stores before anybody reads.
inline bool streams(const EpilogueArgs& e, const void* to, size_t stride) {
  return e.past_caches && (reinterpret_cast<uintptr_t>(to) | stride * sizeof(float)) % 64 == 0;
}

template <bool Streams>
inline void put16(float* to, __m512 value) {
  Streams ? _mm512_stream_ps(to, value) : _mm512_storeu_ps(to, value);
}

template <typename T, bool Streams>
inline void silu_pair_rows(const EpilogueArgs& e) {
  const EpilogueArgs up = up_of(e);
  for (int r = 0; r < e.rows; ++r) {
    for (int tile = 0; tile < 2; ++tile) {
      put16<Streams>(e.h + r * e.h_stride + tile * kTileCols,
                     _mm512_mul_ps(silu16(value16<T>(e, r, tile)), value16<T>(up, r, tile)));
    }
  }
}

template <typename T>
void silu_pair(const EpilogueArgs& e) {
  streams(e, e.h, e.h_stride) ? silu_pair_rows<T, true>(e) : silu_pair_rows<T, false>(e);
}

inline __mmask16 column_mask(int cols, int tile) {
  const int left = cols - tile * kTileCols;
  return left <= 0 ? 0 : tail_mask(static_cast<size_t>(left));
}

template <typename T>
void add_weighted(const EpilogueArgs& e) {
  const __mmask16 masks[2] = {column_mask(e.cols, 0), column_mask(e.cols, 1)};
  for (int r = 0; r < e.rows; ++r) {
    float* y = static_cast<float*>(e.out) + e.token[r] * e.out_stride;
    const __m512 weight = _mm512_set1_ps(e.weight[r]);
    for (int tile = 0; tile < 2; ++tile) {
      float* at = y + tile * kTileCols;
      // multiply, then add: the same two roundings as the scalar kernel
      const __m512 part = _mm512_mul_ps(weight, value16<T>(e, r, tile));
      const __m512 before = _mm512_maskz_loadu_ps(e.first[r] ? 0 : masks[tile], at);
      _mm512_mask_storeu_ps(at, masks[tile], _mm512_add_ps(before, part));
    }
  }
}

template <typename T>
inline void stream_f32(const EpilogueArgs& e) {
  for (int r = 0; r < e.rows; ++r) {
    float* out = static_cast<float*>(e.out) + r * e.out_stride;
    for (int tile = 0; tile < 2; ++tile) put16<true>(out + tile * kTileCols, value16<T>(e, r, tile));
  }
}

template <typename T>
void store_f32(const EpilogueArgs& e) {
  if (e.cols == kStripCols && streams(e, e.out, e.out_stride)) return stream_f32<T>(e);
  for (int r = 0; r < e.rows; ++r) {
    float* out = static_cast<float*>(e.out) + r * e.out_stride;
    for (int tile = 0; tile < 2; ++tile) {
      _mm512_mask_storeu_ps(out + tile * kTileCols, column_mask(e.cols, tile), value16<T>(e, r, tile));
    }
  }
}

inline __m256i to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet));
}

template <typename T>
void store_bf16(const EpilogueArgs& e) {
  for (int r = 0; r < e.rows; ++r) {
    uint16_t* out = static_cast<uint16_t*>(e.out) + r * e.out_stride;
    for (int tile = 0; tile < 2; ++tile) {
      _mm256_mask_storeu_epi16(out + tile * kTileCols, column_mask(e.cols, tile), to_bf16(value16<T>(e, r, tile)));
    }
  }
}

// 8 rows x 32 columns, as dot_s8: two weight vectors from L1 serve 16 dot products, activations come as broadcasts.
uint64_t peak_s8(uint8_t* operands, int iterations) {
  constexpr int kRows = 8, kBytesPerDot = 2 * 64;
  __m512i acc[kRows][2];
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
  for (int i = 0; i < iterations; ++i) {
    for (const uint8_t* b = operands; b < operands + kPeakOperandBytes; b += kBytesPerDot) {
      const __m512i b0 = _mm512_load_si512(b), b1 = _mm512_load_si512(b + 64);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i four = broadcast4(reinterpret_cast<const int8_t*>(b) + r * 4);
        acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], b0, four);
        acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], b1, four);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    _mm512_store_si512(operands + kPeakOperandBytes + r * 128, acc[r][0]);
    _mm512_store_si512(operands + kPeakOperandBytes + r * 128 + 64, acc[r][1]);
  }
  return static_cast<uint64_t>(iterations) * (kPeakOperandBytes / kBytesPerDot) * kRows * 2 * 64 * 2;
}

// The same shape in float FMA, without the unpacking of bf16.
uint64_t peak_bf16(uint8_t* operands, int iterations) {
  constexpr int kRows = 8, kBytesPerDot = 2 * 64;
  __m512 acc[kRows][2];
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  for (int i = 0; i < iterations; ++i) {
    for (const uint8_t* b = operands; b < operands + kPeakOperandBytes; b += kBytesPerDot) {
      const __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + 64);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512 one = _mm512_castsi512_ps(broadcast4(reinterpret_cast<const int8_t*>(b) + r * 4));
        acc[r][0] = _mm512_fmadd_ps(b0, one, acc[r][0]);
        acc[r][1] = _mm512_fmadd_ps(b1, one, acc[r][1]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    _mm512_store_ps(operands + kPeakOperandBytes + r * 128, acc[r][0]);
    _mm512_store_ps(operands + kPeakOperandBytes + r * 128 + 64, acc[r][1]);
  }
  return static_cast<uint64_t>(iterations) * (kPeakOperandBytes / kBytesPerDot) * kRows * 2 * 16 * 2;
}

}  // namespace

extern const KernelTable kAvx512Table = {
    "avx512",
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
