#include "rows.h"

#include <algorithm>
#include <cstring>

#include "blocks.h"
#include "row_math.h"

namespace kt {
namespace {

void copy_bf16(const Input& x, int r, uint16_t* out, size_t padded) {
  if (x.is_bf16) {
    std::memcpy(out, x.row(r), 2 * static_cast<size_t>(x.cols));
  } else {
    round_bf16(static_cast<const float*>(x.row(r)), static_cast<size_t>(x.cols), out);
  }
  std::memset(out + x.cols, 0, 2 * (padded - static_cast<size_t>(x.cols)));
}

void copy_f32(const Input& x, int r, float* out, size_t padded) {
  if (x.is_bf16) {
    const uint16_t* from = static_cast<const uint16_t*>(x.row(r));
    for (int c = 0; c < x.cols; ++c) {
      const uint32_t bits = static_cast<uint32_t>(from[c]) << 16;
      std::memcpy(out + c, &bits, sizeof bits);
    }
  } else {
    std::memcpy(out, x.row(r), 4 * static_cast<size_t>(x.cols));
  }
  std::memset(out + x.cols, 0, 4 * (padded - static_cast<size_t>(x.cols)));
}

int blocks_of(int cols) { return (cols + kBlockInputs - 1) / kBlockInputs; }

// From so many rows on expanding a strip to int8 tiles is cheaper than multiplying with its blocks row by row.
constexpr int kBlockTileRows = 8;

}  // namespace

void StageNeeds::add(Arithmetic arithmetic) {
  int8 |= arithmetic == Arithmetic::kInt8;
  bf16 |= arithmetic == Arithmetic::kBf16;
  f32 |= arithmetic == Arithmetic::kFloat;
  blocks |= arithmetic == Arithmetic::kBlocks;
}

Arithmetic arithmetic_for(const KernelTable& kernels, const FormatInfo& info, const Input& x, int rows) {
  if (info.is_block()) {
    const bool tiles = kernels.tile_s8 && kernels.blocks->expand_s8 && rows >= kBlockTileRows;
    return tiles ? Arithmetic::kInt8 : Arithmetic::kBlocks;
  }
  if (info.format != Format::kBf16) return Arithmetic::kInt8;
  const bool tiles = (x.is_bf16 || x.may_round) && kernels.tile_bf16 && rows >= kernels.tile_min_rows;
  return tiles ? Arithmetic::kBf16 : Arithmetic::kFloat;
}

bool uses_tiles(const KernelTable& kernels, Arithmetic arithmetic, int rows) {
  if (arithmetic == Arithmetic::kFloat || arithmetic == Arithmetic::kBlocks) return false;
  return arithmetic == Arithmetic::kBf16 || (kernels.tile_s8 && rows >= kernels.tile_min_rows);
}

size_t int8_stride(int cols) { return round_up(static_cast<size_t>(cols), kBlockInputs); }
size_t bf16_stride(int cols) { return round_up(static_cast<size_t>(cols), 32) * 2; }
size_t f32_stride(int cols) { return round_up(static_cast<size_t>(cols), 32) * 4; }
size_t blocks_stride(int cols) { return static_cast<size_t>(blocks_of(cols)) * sizeof(BlockActivations); }
size_t widest_stride(int cols) { return std::max(f32_stride(cols), blocks_stride(cols)); }

size_t stage_stride(Arithmetic arithmetic, int cols) {
  if (arithmetic == Arithmetic::kInt8) return int8_stride(cols);
  if (arithmetic == Arithmetic::kBlocks) return blocks_stride(cols);
  return arithmetic == Arithmetic::kBf16 ? bf16_stride(cols) : f32_stride(cols);
}

void reserve_stage(RowStage& stage, const StageNeeds& needs, int rows, int cols) {
  const size_t n = static_cast<size_t>(rows);
  if (needs.int8) {
    stage.int8.reserve(n * int8_stride(cols));
    stage.scale.reserve(n * sizeof(float));
    stage.sum.reserve(n * sizeof(int32_t));
  }
  if (needs.bf16) stage.bf16.reserve(n * bf16_stride(cols));
  if (needs.f32) stage.f32.reserve(n * f32_stride(cols));
  if (needs.blocks) stage.blocks.reserve(n * blocks_stride(cols));
}

void convert_row(const KernelTable& kernels, const Input& x, int r, Arithmetic arithmetic, uint8_t* out, float* scale,
                 int32_t* sum) {
  const size_t cols = static_cast<size_t>(x.cols);
  if (arithmetic == Arithmetic::kBf16) {
    copy_bf16(x, r, reinterpret_cast<uint16_t*>(out), bf16_stride(x.cols) / 2);
  } else if (arithmetic == Arithmetic::kFloat) {
    copy_f32(x, r, reinterpret_cast<float*>(out), f32_stride(x.cols) / 4);
  } else if (arithmetic == Arithmetic::kBlocks) {
    auto* blocks = reinterpret_cast<BlockActivations*>(out);
    if (x.is_bf16) {
      kernels.blocks->quantize_bf16(static_cast<const uint16_t*>(x.row(r)), cols, blocks_of(x.cols), blocks);
    } else {
      kernels.blocks->quantize_f32(static_cast<const float*>(x.row(r)), cols, blocks_of(x.cols), blocks);
    }
  } else if (x.is_bf16) {
    kernels.quantize_bf16(static_cast<const uint16_t*>(x.row(r)), cols, int8_stride(x.cols),
                          reinterpret_cast<int8_t*>(out), scale, sum);
  } else {
    kernels.quantize_f32(static_cast<const float*>(x.row(r)), cols, int8_stride(x.cols), reinterpret_cast<int8_t*>(out),
                         scale, sum);
  }
}

void stage_row(const KernelTable& kernels, const Input& x, int r, const StageNeeds& needs, RowStage& stage, int to) {
  const size_t at = static_cast<size_t>(to);
  if (needs.int8) {
    convert_row(kernels, x, r, Arithmetic::kInt8, stage.int8.bytes() + at * int8_stride(x.cols),
                stage.scale.as<float>() + at, stage.sum.as<int32_t>() + at);
  }
  if (needs.bf16) {
    convert_row(kernels, x, r, Arithmetic::kBf16, stage.bf16.bytes() + at * bf16_stride(x.cols), nullptr, nullptr);
  }
  if (needs.f32) {
    convert_row(kernels, x, r, Arithmetic::kFloat, stage.f32.bytes() + at * f32_stride(x.cols), nullptr, nullptr);
  }
  if (needs.blocks) {
    convert_row(kernels, x, r, Arithmetic::kBlocks, stage.blocks.bytes() + at * blocks_stride(x.cols), nullptr,
                nullptr);
  }
}

const uint8_t* staged_row(const RowStage& stage, Arithmetic arithmetic, int cols, int r) {
  const Buffer& rows = arithmetic == Arithmetic::kInt8     ? stage.int8
                       : arithmetic == Arithmetic::kBf16   ? stage.bf16
                       : arithmetic == Arithmetic::kBlocks ? stage.blocks
                                                           : stage.f32;
  return rows.bytes() + static_cast<size_t>(r) * stage_stride(arithmetic, cols);
}

}  // namespace kt
