// AMX kernels: int8 and bf16 GEMM over 2x2 tiles. Everything else of the "amx" table is AVX-512's.
#include <immintrin.h>

#include "cpu_features.h"
#include "kernels.h"

namespace kt {
namespace {

constexpr uint64_t kRequired = kAmxPermission
#ifdef __AMX_TILE__
                               | kAmxTile
#endif
#ifdef __AMX_INT8__
                               | kAmxInt8
#endif
#ifdef __AMX_BF16__
                               | kAmxBf16
#endif
#ifdef __AVX512BF16__
                               | kAvx512bf16
#endif
    ;

struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

// The height now configured on this thread; 0: none. A tile load without a configuration is a SIGILL.
thread_local int configured_rows = 0;

// Tiles 0-3: C (row tile 0: columns 0-15, 16-31; row tile 1: the same), 4-5: A, 6-7: B.
void tile_configure(int tile_rows) {
  if (configured_rows == tile_rows) return;
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.bytes_per_row[i] = 64;
    config.rows[i] = static_cast<uint8_t>(i < 6 ? tile_rows : 16);
  }
  // gcc 12 believes _tile_loadconfig reads 8 of the 64 bytes and drops the other stores; the barrier keeps them.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
  configured_rows = tile_rows;
}

void tile_release() {
  if (configured_rows == 0) return;
  _tile_release();
  configured_rows = 0;
}

// Line fill buffers are the scarce thing (16 per core): a line from memory holds one for about 70 ns, a line from L2 for
// about 6 ns, and dot products overlap with neither (csrc/README.md, "Memory"). So the first pass over a strip asks for
// its lines one k-step ahead and straight into L1; later passes, which find the strip in L2, ask for the start of the
// next strip, evenly paced, and the first pass over that one leaves those lines out.
struct Ahead {
  const char* at;
  const char* end;
  int lines_per_step;

  Ahead(const uint8_t* begin, size_t bytes, int steps)
      : at(reinterpret_cast<const char*>(begin)), end(begin ? at + bytes : at) {
    const int lines = static_cast<int>((end - at + 63) / 64);
    lines_per_step = steps > 0 ? (lines + steps - 1) / steps : 0;
  }

  inline void step() {
    for (int i = 0; i < lines_per_step && at < end; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
  }
};

// A quarter (8 lines) of the k-step after `b`.
template <int Quarter>
inline void near_lines(const uint8_t* b) {
  const char* at = reinterpret_cast<const char*>(b) + kStripStepBytes + Quarter * 512;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm_prefetch(at + i * 64, _MM_HINT_T0);
}

struct Int8 {
  static constexpr bool kIsInt8 = true;
};
struct Bf16 {
  static constexpr bool kIsInt8 = false;
};

// A tile number must be a literal in the instruction, so the accumulator is a template argument.
#define KT_DOT(C, A, B)          \
  if constexpr (Type::kIsInt8) { \
    _tile_dpbssd(C, A, B);       \
  } else {                       \
    _tile_dpbf16ps(C, A, B);     \
  }

inline void load_c(bool accumulate, const char* c0, const char* c1, size_t stride) {
  if (!accumulate) {
    _tile_zero(0);
    _tile_zero(1);
    if (c1) _tile_zero(2);
    if (c1) _tile_zero(3);
    return;
  }
  _tile_loadd(0, c0, stride);
  _tile_loadd(1, c0 + 64, stride);
  if (c1) _tile_loadd(2, c1, stride);
  if (c1) _tile_loadd(3, c1 + 64, stride);
}

// Two row tiles x two column tiles over all k-steps; with_a1 false: one row tile.
template <typename Type, bool WithA1, bool Near>
inline void tile_pass(const TileArgs& args, const uint8_t* a0, char* c0, Ahead& ahead_a, Ahead& ahead_b) {
  const size_t c_stride = kStripCols * 4;
  const size_t a_step = static_cast<size_t>(args.tile_rows) * kStepBytes;
  const uint8_t* a1 = a0 + args.a_tile_stride;
  char* c1 = WithA1 ? c0 + args.tile_rows * c_stride : nullptr;
  load_c(args.accumulate, c0, c1, c_stride);
  const uint8_t* b = args.b;
  const int near_from = args.prefetched_steps - 1;
  for (int step = 0; step < args.k_steps; ++step) {
    const bool near = Near && step >= near_from;
    _tile_loadd(6, b, 64);
    if (near) near_lines<0>(b);
    _tile_loadd(4, a0, 64);
    KT_DOT(0, 4, 6)
    if (near) near_lines<1>(b);
    _tile_loadd(7, b + kTileBytes, 64);
    KT_DOT(1, 4, 7)
    if (near) near_lines<2>(b);
    if constexpr (WithA1) {
      _tile_loadd(5, a1, 64);
      KT_DOT(2, 5, 6)
      KT_DOT(3, 5, 7)
    }
    if (near) near_lines<3>(b);
    if (!Near) ahead_b.step();
    ahead_a.step();
    a0 += a_step;
    a1 += a_step;
    b += kStripStepBytes;
  }
  _tile_stored(0, c0, c_stride);
  _tile_stored(1, c0 + 64, c_stride);
  if constexpr (WithA1) {
    _tile_stored(2, c1, c_stride);
    _tile_stored(3, c1 + 64, c_stride);
  }
}

template <typename Type>
inline void tile_gemm(const TileArgs& args) {
  const int pairs = args.tiles / 2;
  const int passes = pairs + args.tiles % 2;
  Ahead ahead_b(args.prefetch_b, args.prefetch_b_bytes, (passes - args.from_memory) * args.k_steps);
  Ahead ahead_a(args.prefetch_a, args.prefetch_a_bytes, passes * args.k_steps);
  const uint8_t* a = args.a;
  char* c = static_cast<char*>(args.c);
  const size_t c_tile_bytes = static_cast<size_t>(args.tile_rows) * kStripCols * 4;
  for (int pass = 0; pass < passes; ++pass, a += 2 * args.a_tile_stride, c += 2 * c_tile_bytes) {
    const bool near = args.from_memory && pass == 0;
    if (pass == pairs) {
      near ? tile_pass<Type, false, true>(args, a, c, ahead_a, ahead_b)
           : tile_pass<Type, false, false>(args, a, c, ahead_a, ahead_b);
    } else {
      near ? tile_pass<Type, true, true>(args, a, c, ahead_a, ahead_b)
           : tile_pass<Type, true, false>(args, a, c, ahead_a, ahead_b);
    }
  }
}

void tile_s8(const TileArgs& args) { tile_gemm<Int8>(args); }
void tile_bf16(const TileArgs& args) { tile_gemm<Bf16>(args); }

// The 2x2 blocking of the kernels above with its operands in L1: 4 tile loads per 4 dot products, interleaved. With
// fewer loads the unit runs about a fifth faster (Granite Rapids: 7.1 against 6.0 TOPS), which no GEMM can use.
#define KT_PEAK_KERNEL(NAME, DOT, K_PER_STEP)                                                       \
  uint64_t NAME(uint8_t* operands, int iterations) {                                                \
    tile_configure(kTileRows);                                                                      \
    _tile_zero(0);                                                                                  \
    _tile_zero(1);                                                                                  \
    _tile_zero(2);                                                                                  \
    _tile_zero(3);                                                                                  \
    for (int i = 0; i < iterations; ++i) {                                                          \
      for (const uint8_t* at = operands; at < operands + kPeakOperandBytes; at += 4 * kTileBytes) { \
        _tile_loadd(6, at, 64);                                                                     \
        _tile_loadd(4, at + 2 * kTileBytes, 64);                                                    \
        DOT(0, 4, 6);                                                                               \
        _tile_loadd(7, at + kTileBytes, 64);                                                        \
        DOT(1, 4, 7);                                                                               \
        _tile_loadd(5, at + 3 * kTileBytes, 64);                                                    \
        DOT(2, 5, 6);                                                                               \
        DOT(3, 5, 7);                                                                               \
      }                                                                                             \
    }                                                                                               \
    uint8_t* result = operands + kPeakOperandBytes;                                                 \
    _tile_stored(0, result, 64);                                                                    \
    _tile_stored(1, result + kTileBytes, 64);                                                       \
    _tile_stored(2, result + 2 * kTileBytes, 64);                                                   \
    _tile_stored(3, result + 3 * kTileBytes, 64);                                                   \
    tile_release();                                                                                 \
    constexpr uint64_t kDots = kPeakOperandBytes / (4 * kTileBytes) * 4;                            \
    return static_cast<uint64_t>(iterations) * kDots * kTileRows * kTileCols * K_PER_STEP * 2;      \
  }

KT_PEAK_KERNEL(peak_s8, _tile_dpbssd, 64)
KT_PEAK_KERNEL(peak_bf16, _tile_dpbf16ps, 32)

#undef KT_PEAK_KERNEL

}  // namespace

extern const KernelTable kAmxTable = {
    "amx",        kRequired, nullptr,   nullptr, nullptr, nullptr, nullptr,   tile_configure,
    tile_release, tile_s8,   tile_bf16, 3,       nullptr, nullptr, nullptr,   nullptr,
    nullptr,      nullptr,   nullptr,   nullptr, nullptr, peak_s8, peak_bf16,
};

}  // namespace kt
