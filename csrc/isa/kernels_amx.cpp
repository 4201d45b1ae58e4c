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

// C of so many row tiles is still in L1 from the last K block. Asking for it all the same costs a tenth at 64 rows.
constexpr int kTilesInL1 = 4;

// Lines asked for evenly: some with every k-step, a line of every stream in turn.
template <int Hint>
struct Paced {
  const char* at;
  int left;  // lines
  int per_step;
  BStreams streams;
  int stream = 0;

  Paced(const void* begin, size_t bytes, int steps, BStreams from = {1, 0})
      : at(static_cast<const char*>(begin)),
        left(begin ? static_cast<int>((bytes + 63) / 64) : 0),
        per_step(0),
        streams(from) {
    if (steps > 0) per_step = (left + steps - 1) / steps;
  }

  inline void step() {
    for (int i = 0; i < per_step && left > 0; ++i, --left) {
      _mm_prefetch(at, static_cast<_mm_hint>(Hint));
      at += streams.stride;
      if (++stream == streams.count) stream = 0, at += 64 - static_cast<ptrdiff_t>(streams.count * streams.stride);
    }
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

// Two row tiles (one without WithA1) x two column tiles over all k-steps. Activations are loaded past L1 (the stream hint),
// which is left to the weights: every pass uses them again.
template <typename Type, bool WithA1, bool Near>
inline void tile_pass(const TileArgs& args, const uint8_t* a, char* c, Paced<_MM_HINT_T0>& ahead_b,
                      Paced<_MM_HINT_T1>& ahead_a) {
  const size_t c_stride = kStripCols * 4;
  const size_t tile_bytes = static_cast<size_t>(args.tile_rows) * kStepBytes;
  const size_t c_bytes = (WithA1 ? 2 : 1) * args.tile_rows * c_stride;
  char* c1 = WithA1 ? c + args.tile_rows * c_stride : nullptr;
  load_c(args.accumulate, c, c1, c_stride);
  const bool asks_c = args.accumulate && !Near && args.tiles > kTilesInL1;
  Paced<_MM_HINT_T0> next_c(c + c_bytes, asks_c ? c_bytes : 0, args.k_steps);
  const uint8_t* b = args.b;
  const ptrdiff_t back = kStripStepBytes - static_cast<ptrdiff_t>(args.streams.count * args.streams.stride);
  for (int step = 0, stream = 0; step < args.k_steps; ++step) {
    _tile_loadd(6, b, 64);
    if (Near) near_lines<0>(b);
    _tile_stream_loadd(4, a, 64);
    KT_DOT(0, 4, 6)
    if (Near) near_lines<1>(b);
    _tile_loadd(7, b + kTileBytes, 64);
    KT_DOT(1, 4, 7)
    if (Near) near_lines<2>(b);
    if constexpr (WithA1) {
      a += tile_bytes;
      _tile_stream_loadd(5, a, 64);
      KT_DOT(2, 5, 6)
      KT_DOT(3, 5, 7)
    }
    if (Near) near_lines<3>(b);
    if (!Near) {
      ahead_b.step();
      ahead_a.step();
      next_c.step();
    }
    a += tile_bytes;
    b += args.streams.stride;
    if (++stream == args.streams.count) stream = 0, b += back;
  }
  _tile_stored(0, c, c_stride);
  _tile_stored(1, c + 64, c_stride);
  if constexpr (WithA1) {
    _tile_stored(2, c1, c_stride);
    _tile_stored(3, c1 + 64, c_stride);
  }
}

template <typename Type>
inline void tile_gemm(const TileArgs& args) {
  const int steps = (args.tiles + 1) / 2 * args.k_steps;
  Paced<_MM_HINT_T0> ahead_b(args.prefetch_b, args.prefetch_b_bytes, steps, args.prefetch_streams);
  Paced<_MM_HINT_T1> ahead_a(args.prefetch_a, args.prefetch_a_bytes, steps);
  const size_t pair_rows = 2 * static_cast<size_t>(args.tile_rows);
  const uint8_t* a = args.a;
  char* c = static_cast<char*>(args.c);
  for (int tile = 0; tile < args.tiles; tile += 2) {
    const bool near = args.from_memory && tile == 0;
    if (tile + 1 < args.tiles) {
      near ? tile_pass<Type, true, true>(args, a, c, ahead_b, ahead_a)
           : tile_pass<Type, true, false>(args, a, c, ahead_b, ahead_a);
    } else {
      near ? tile_pass<Type, false, true>(args, a, c, ahead_b, ahead_a)
           : tile_pass<Type, false, false>(args, a, c, ahead_b, ahead_a);
    }
    a += pair_rows * kStepBytes * args.k_steps;
    c += pair_rows * kStripCols * 4;
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
    "amx",   kRequired, nullptr, nullptr, nullptr, nullptr, nullptr,   tile_configure, tile_release,
    tile_s8, tile_bf16, 3,       nullptr, nullptr, nullptr, nullptr,   nullptr,        nullptr,
    nullptr, nullptr,   nullptr, nullptr, nullptr, peak_s8, peak_bf16,
};

}  // namespace kt
