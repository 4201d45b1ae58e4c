// Weights in ggml's blocks (Q4_K, Q5_K, Q6_K, Q8_0), bit for bit, re-tiled into strips (PACK.md, "Block formats"); the kernels
// that multiply with them. What a block holds is integers and float16 scales: nothing is dequantised to be stored.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace kt {

enum class BlockKind : int { kNone, kQ4K, kQ5K, kQ6K, kQ8_0 };

// A strip of 32 columns is a row of strip blocks. Codes lie in lines of 64 bytes as in an int4 strip: 16 columns x 4 inputs.
constexpr int kQ4KBytes = 32 * 144;     // 0: d, 64: dmin (float16 [32]), 128: scales and mins in 6 bits, 512: codes
constexpr int kQ5KBytes = 32 * 176;     // the same header, 512: fifth bits, 1536: codes
constexpr int kQ6KBytes = 32 * 210;     // 0: d, 64: int8 scales, 576: two halves of 1024 bytes upper bits, 2048 codes
constexpr int kQ8_0Bytes = 64 * 34;     // 0: d (float16 [2][32]), 128: codes; 64 inputs instead of 256
constexpr int kScaleLinesOffset = 128;  // Q4_K, Q5_K: 6 lines that hold 8
constexpr int kBlockHeaderBytes = 512;
constexpr int kQ5KCodesOffset = 1536;
constexpr int kQ6KScalesOffset = 64;
constexpr int kQ6KHalvesOffset = 576;
constexpr int kQ6KHalfBytes = 3072;
constexpr int kQ8_0CodesOffset = 128;

constexpr int kBlockInputs = 256;  // inputs of an activation block, whatever the weights' blocks

// 256 activations as int8 with a scale of their own, and what the weights' minimums and offsets are multiplied with.
struct alignas(64) BlockActivations {
  int8_t q[kBlockInputs];
  float scale;
  int32_t unused[3];
  int16_t sum32[kBlockInputs / 32];
  int16_t sum16[kBlockInputs / 16];
};
static_assert(sizeof(BlockActivations) == 320, "rows of blocks are indexed by this size");

// Inputs of a ggml block; a strip block of Q8_0 holds two.
constexpr int ggml_block_inputs(BlockKind kind) { return kind == BlockKind::kQ8_0 ? 32 : 256; }
constexpr int block_inputs(BlockKind kind) { return kind == BlockKind::kQ8_0 ? 64 : kBlockInputs; }
constexpr int block_bytes(BlockKind kind) {
  return kind == BlockKind::kQ4K   ? kQ4KBytes
         : kind == BlockKind::kQ5K ? kQ5KBytes
         : kind == BlockKind::kQ6K ? kQ6KBytes
                                   : kQ8_0Bytes;
}

// The kernels of one instruction set for block formats, beside its KernelTable.
struct BlockTable {
  // x [n] and zeros up to `blocks` blocks. A block that holds NaN or inf gets scale NaN.
  void (*quantize_f32)(const float* x, size_t n, int blocks, BlockActivations* out);
  void (*quantize_bf16)(const uint16_t* x, size_t n, int blocks, BlockActivations* out);

  // Rows of blocks (a, a_stride) times one strip -> float. Per weight block one float product: integers before it. The same
  // roundings in the same order in every table, so that all of them give the same bits.
  void (*vec)(BlockKind kind, const VecArgs& args);

  // k_steps k-steps (whole blocks) of a strip as int8 tiles in units of row_scale [32]; null without a matrix unit.
  void (*expand_s8)(BlockKind kind, const uint8_t* strip, int k_steps, const float* row_scale, uint8_t* out);
};

// A table's quantize_*: Block does one block of an instruction set's own file. static, and so is Block: an isa object must not
// share code with others through a weak symbol.
template <typename T, void (*Block)(const T* x, size_t n, BlockActivations* out)>
static void quantize_blocks(const T* x, size_t n, int blocks, BlockActivations* out) {
  for (int block = 0; block < blocks; ++block) {
    const size_t begin = static_cast<size_t>(block) * kBlockInputs;
    const size_t left = begin < n ? n - begin : 0;
    Block(x + begin, left < kBlockInputs ? left : kBlockInputs, out + block);
  }
}

extern const BlockTable kScalarBlocks;
extern const BlockTable kAvx2Blocks;
extern const BlockTable kAvx512Blocks;

}  // namespace kt
