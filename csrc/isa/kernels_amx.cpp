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

// Memory to be touched ahead, a few lines at every k-step.
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

// A macro, because a tile number must be a literal in the instruction and both kernels differ in one instruction only.
#define KT_TILE_KERNEL(NAME, DOT)                                                                      \
  void NAME(const TileArgs& args) {                                                                    \
    const size_t c_stride = kStripCols * 4;                                                            \
    const int pairs = args.tiles / 2;                                                                  \
    const int blocks = pairs + args.tiles % 2;                                                         \
    Ahead ahead_b(args.prefetch_b, args.prefetch_b_bytes, blocks * args.k_steps);                      \
    Ahead ahead_a(args.prefetch_a, args.prefetch_a_bytes, blocks * args.k_steps);                      \
    for (int pair = 0; pair < pairs; ++pair) {                                                         \
      const uint8_t* a0 = args.a + (2 * pair) * args.a_tile_stride;                                    \
      const uint8_t* a1 = a0 + args.a_tile_stride;                                                     \
      const uint8_t* b = args.b;                                                                       \
      const size_t a_step = static_cast<size_t>(args.tile_rows) * kStepBytes;                          \
      char* c0 = static_cast<char*>(args.c) + static_cast<size_t>(2 * pair) * args.tile_rows * c_stride; \
      char* c1 = c0 + args.tile_rows * c_stride;                                                       \
      if (args.accumulate) {                                                                           \
        _tile_loadd(0, c0, c_stride);                                                                  \
        _tile_loadd(1, c0 + 64, c_stride);                                                             \
        _tile_loadd(2, c1, c_stride);                                                                  \
        _tile_loadd(3, c1 + 64, c_stride);                                                             \
      } else {                                                                                         \
        _tile_zero(0);                                                                                 \
        _tile_zero(1);                                                                                 \
        _tile_zero(2);                                                                                 \
        _tile_zero(3);                                                                                 \
      }                                                                                                \
      for (int step = 0; step < args.k_steps; ++step) {                                                \
        _tile_loadd(6, b, 64);                                                                         \
        _tile_loadd(4, a0, 64);                                                                        \
        DOT(0, 4, 6);                                                                                  \
        _tile_loadd(7, b + kTileBytes, 64);                                                            \
        DOT(1, 4, 7);                                                                                  \
        _tile_loadd(5, a1, 64);                                                                        \
        DOT(2, 5, 6);                                                                                  \
        DOT(3, 5, 7);                                                                                  \
        ahead_b.step();                                                                                \
        ahead_a.step();                                                                                \
        a0 += a_step;                                                                                  \
        a1 += a_step;                                                                                  \
        b += kStripStepBytes;                                                                          \
      }                                                                                                \
      _tile_stored(0, c0, c_stride);                                                                   \
      _tile_stored(1, c0 + 64, c_stride);                                                              \
      _tile_stored(2, c1, c_stride);                                                                   \
      _tile_stored(3, c1 + 64, c_stride);                                                              \
    }                                                                                                  \
    if (args.tiles % 2) {                                                                              \
      const uint8_t* a0 = args.a + (args.tiles - 1) * args.a_tile_stride;                              \
      const uint8_t* b = args.b;                                                                       \
      char* c0 = static_cast<char*>(args.c) + static_cast<size_t>(args.tiles - 1) * args.tile_rows * c_stride; \
      if (args.accumulate) {                                                                           \
        _tile_loadd(0, c0, c_stride);                                                                  \
        _tile_loadd(1, c0 + 64, c_stride);                                                             \
      } else {                                                                                         \
        _tile_zero(0);                                                                                 \
        _tile_zero(1);                                                                                 \
      }                                                                                                \
      for (int step = 0; step < args.k_steps; ++step) {                                                \
        _tile_loadd(4, a0, 64);                                                                        \
        _tile_loadd(6, b, 64);                                                                         \
        DOT(0, 4, 6);                                                                                  \
        _tile_loadd(7, b + kTileBytes, 64);                                                            \
        DOT(1, 4, 7);                                                                                  \
        ahead_b.step();                                                                                \
        ahead_a.step();                                                                                \
        a0 += static_cast<size_t>(args.tile_rows) * kStepBytes;                                        \
        b += kStripStepBytes;                                                                          \
      }                                                                                                \
      _tile_stored(0, c0, c_stride);                                                                   \
      _tile_stored(1, c0 + 64, c_stride);                                                              \
    }                                                                                                  \
  }

KT_TILE_KERNEL(tile_s8, _tile_dpbssd)
KT_TILE_KERNEL(tile_bf16, _tile_dpbf16ps)

#undef KT_TILE_KERNEL

}  // namespace

extern const KernelTable kAmxTable = {
    "amx",   kRequired,      nullptr,      nullptr, nullptr,   nullptr, nullptr, tile_configure, tile_release, tile_s8,
    tile_bf16, 3,  nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace kt
