// The contract between the engine and one instruction set. An ISA file implements these plain functions and exports
// one const KernelTable; it starts no thread, allocates nothing, throws nothing and holds no C++ library code.
//
// Names: a GEMM is C[M, N] = A[M, K] * B[N, K]^T. M: activation rows, N: weight rows (output features), K: input features.
// A *strip* is 32 weight rows stored as two 16-row tiles side by side for every k-step of 64 bytes (PACK.md, "Blob layout").
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

constexpr int kStripCols = 32;    // two 16-column AMX tiles
constexpr int kTileCols = 16;     // 16 columns x 4 bytes = the 64-byte row of an AMX B tile
constexpr int kTileRows = 16;     // most rows of an AMX tile
constexpr int kStepBytes = 64;    // one k-step of one activation row: 64 int8 or 32 bf16
constexpr int kTileBytes = 1024;  // 16 rows x 64 bytes
constexpr int kStripStepBytes = 2 * kTileBytes;
constexpr int kPeakOperandBytes = 16 << 10;  // of a peak kernel: a third of the smallest L1 with AMX
constexpr int kPeakResultBytes = 4 << 10;
constexpr int kInt4HeaderBytes = 64;  // per group of an int4 strip: 32 scales, 32 zeros

// An int4 strip is a row of blocks: the headers of the block's groups, then 1024 bytes of codes for each of its k-steps.
// A group of 32 is half a k-step (low nibbles, high nibbles), so its block is one k-step with two headers.
constexpr int int4_block_steps(int k_group) { return k_group < 64 ? 1 : k_group / 64; }
constexpr int int4_headers(int k_group) { return k_group < 64 ? 2 : 1; }
constexpr int int4_block_bytes(int k_group) {
  return int4_headers(k_group) * kInt4HeaderBytes + int4_block_steps(k_group) * kTileBytes;
}

// Activations as rows: row r starts at a + r * a_stride; `sum` is the sum of its int8 values (S8 kernels only).
struct VecArgs {
  const void* a;
  size_t a_stride;
  const int32_t* sum;
  int rows;
  const uint8_t* b;  // the strip, from the first k-step wanted
  int k_steps;
  int k_group;      // int4: input features per group
  void* c;          // [rows][32] int32 or float
  bool accumulate;  // add to c instead of overwriting it
};

// The k-steps of a K block lie in `count` streams of equal length, `stride` bytes apart: the first k-step of every stream, then the
// second of every stream. One stream is plain memory order.
struct BStreams {
  int count;
  size_t stride;
};

// Activations as pairs of tiles of equal height (one tile alone if there is only one): pair i is
// [k-step][rows of the pair][64 bytes], pairs follow each other. One K block of one strip.
struct TileArgs {
  const uint8_t* a;
  int tiles;
  int tile_rows;
  const uint8_t* b;
  BStreams streams;  // where the k-steps of b lie
  int k_steps;
  void* c;  // [tiles * tile_rows][32] int32 or float
  bool accumulate;
  bool from_memory;           // b may be in no cache: the first pass asks for it one k-step ahead
  const uint8_t* prefetch_b;  // weights wanted next, touched evenly; may be null
  BStreams prefetch_streams;
  size_t prefetch_b_bytes;    // of all streams together
  const uint8_t* prefetch_a;  // the next K block of the activations: one run of prefetch_a_bytes
  size_t prefetch_a_bytes;
};

// What happens to a finished C block. scale_a: per row, scale_b: per column of the strip; both null for float C.
struct EpilogueArgs {
  const void* c;  // [rows][32]
  int rows;
  const float* scale_a;
  const float* scale_b;
  // silu_mul: h[r][0..15] = silu(gate) * up; silu_pair: h[r][0..31], gate in c, up in c_up
  float* h;
  size_t h_stride;  // floats
  const void* c_up;
  const float* scale_b_up;
  // add_weighted: y[token[r]][0..cols) += weight[r] * value, where y counts as 0, unread, if first[r];
  // store: out[r][0..cols) = value
  const int32_t* token;
  const float* weight;
  const uint8_t* first;
  void* out;          // already at the strip's first column
  size_t out_stride;  // elements
  int cols;           // valid columns of this strip, 1..32
  bool past_caches;   // out or h is larger than they are: a kernel may store past them (only silu_pair and store)
};

struct BlockTable;  // blocks.h

struct KernelTable {
  const char* name;
  uint64_t required;  // bits of Feature, from the compiler's own macros in that file

  // Symmetric int8 of one row: q = round(x * 127 / max|x|), zero-padded to `padded`; a row that holds NaN or inf gets scale NaN.
  void (*quantize_f32)(const float* x, size_t n, size_t padded, int8_t* q, float* scale, int32_t* sum);
  void (*quantize_bf16)(const uint16_t* x, size_t n, size_t padded, int8_t* q, float* scale, int32_t* sum);

  // Row-major activations, any number of rows.
  void (*vec_s8)(const VecArgs&);    // int8 x int8 -> int32
  void (*vec_s4)(const VecArgs&);    // int8 x int4 -> int32
  void (*vec_bf16)(const VecArgs&);  // float x bf16 -> float

  // Tiled activations; null without a matrix unit. configure before, release after, on the same thread.
  void (*tile_configure)(int tile_rows);
  void (*tile_release)();
  void (*tile_s8)(const TileArgs&);
  void (*tile_bf16)(const TileArgs&);
  int tile_min_rows;  // fewer rows than this go to the vec kernels

  // Expands k_steps k-steps of an int4 strip into the int8 strip layout.
  void (*unpack_s4)(const uint8_t* strip, int k_steps, int k_group, uint8_t* out);

  void (*silu_mul_s32)(const EpilogueArgs&);
  void (*silu_mul_f32)(const EpilogueArgs&);
  void (*silu_pair_s32)(const EpilogueArgs&);
  void (*silu_pair_f32)(const EpilogueArgs&);
  void (*add_weighted_s32)(const EpilogueArgs&);
  void (*add_weighted_f32)(const EpilogueArgs&);
  void (*store_f32_s32)(const EpilogueArgs&);  // out float
  void (*store_f32_f32)(const EpilogueArgs&);
  void (*store_bf16_s32)(const EpilogueArgs&);  // out bf16
  void (*store_bf16_f32)(const EpilogueArgs&);

  // The compute ceiling (ceilings.h): dot products in the blocking of this table's GEMM, `iterations` times over
  // kPeakOperandBytes that stay in L1; results go to the kPeakResultBytes behind them. Returns the operations done.
  uint64_t (*peak_s8)(uint8_t* operands, int iterations);
  uint64_t (*peak_bf16)(uint8_t* operands, int iterations);

  const BlockTable* blocks = nullptr;  // set by dispatch.cpp
};

extern const KernelTable kScalarTable;
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
extern const KernelTable kAmxTable;  // only the tile functions; the rest comes from kAvx512Table

}  // namespace kt
