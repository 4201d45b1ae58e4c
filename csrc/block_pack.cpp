#include "block_pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "blocks.h"
#include "dequantize.h"

namespace kt {
namespace {

// ggml's blocks: weights per block, bytes, and where the parts lie.
struct GgmlBlock {
  int inputs;
  int bytes;
  int d, dmin;  // float16; dmin -1: none
};

GgmlBlock ggml_block(BlockKind kind) {
  switch (kind) {
    case BlockKind::kQ4K:
      return {256, 144, 0, 2};
    case BlockKind::kQ5K:
      return {256, 176, 0, 2};
    case BlockKind::kQ6K:
      return {256, 210, 208, -1};
    default:
      return {32, 34, 0, -1};
  }
}

bool is_finite_half(const uint8_t* at) { return (at[1] & 0x7c) != 0x7c; }

// ggml's 12 bytes of eight 6-bit scales (0..7) and eight mins (8..15).
int ggml_six_bits(const uint8_t* s, int index) {
  const int j = index % 8, shift = index < 8 ? 0 : 4;
  if (j < 4) return s[index < 8 ? j : j + 4] & 63;
  return (s[j + 4] >> shift & 15) | s[index < 8 ? j - 4 : j] >> 6 << 4;
}

void set_ggml_six_bits(uint8_t* s, int index, int value) {
  const int j = index % 8, shift = index < 8 ? 0 : 4;
  if (j < 4) {
    s[index < 8 ? j : j + 4] |= static_cast<uint8_t>(value);
    return;
  }
  s[j + 4] |= static_cast<uint8_t>((value & 15) << shift);
  s[index < 8 ? j - 4 : j] |= static_cast<uint8_t>(value >> 4 << 6);
}

int strip_six_bits(const uint8_t* block, int col, int index) {
  const uint8_t* at = block + kScaleLinesOffset + col * 2 + index % 2;
  const int line = index / 2;
  if (line < 6) return at[line * 64] & 63;
  at += (line - 6) * 192;
  return at[0] >> 6 | at[64] >> 6 << 2 | at[128] >> 6 << 4;
}

void set_strip_six_bits(uint8_t* block, int col, int index, int value) {
  uint8_t* at = block + kScaleLinesOffset + col * 2 + index % 2;
  const int line = index / 2;
  if (line < 6) {
    at[line * 64] |= static_cast<uint8_t>(value);
    return;
  }
  at += (line - 6) * 192;
  for (int i = 0; i < 3; ++i) at[i * 64] |= static_cast<uint8_t>((value >> 2 * i & 3) << 6);
}

// A copy in either direction: `to_strip` says which.
struct Copy {
  bool to_strip;

  void bytes(uint8_t* strip, uint8_t* row, size_t n) const {
    std::memcpy(to_strip ? strip : row, to_strip ? row : strip, n);
  }
  // n bytes of a row as a column's lanes of `lines`, 512 bytes to a tile of 8 lines (or 1024, of 16).
  void lanes(uint8_t* lines, int tile_bytes, int col, uint8_t* row, int n) const {
    uint8_t* lane = lines + (col / 16) * tile_bytes + (col % 16) * 4;
    for (int i = 0; i < n; i += 4) bytes(lane + i * 16, row + i, 4);
  }
  void six_bits(uint8_t* block, int col, uint8_t* scales) const {
    for (int i = 0; i < 16; ++i) {
      if (to_strip) {
        set_strip_six_bits(block, col, i, ggml_six_bits(scales, i));
      } else {
        set_ggml_six_bits(scales, i, strip_six_bits(block, col, i));
      }
    }
  }
};

// One column of a strip block and the ggml block (for Q8_0: the blocks, `count` of them) that it is. What is written to
// must be zero before.
void copy_block(const Copy& copy, BlockKind kind, uint8_t* block, int col, uint8_t* row, int count) {
  if (kind == BlockKind::kQ8_0) {
    for (int i = 0; i < count; ++i) {
      copy.bytes(block + i * 64 + col * 2, row + i * 34, 2);
      copy.lanes(block + kQ8_0CodesOffset + i * 512, kTileBytes, col, row + i * 34 + 2, 32);
    }
    return;
  }
  if (kind == BlockKind::kQ6K) {
    copy.bytes(block + col * 2, row + 208, 2);
    for (int i = 0; i < 16; ++i) copy.bytes(block + kQ6KScalesOffset + i / 2 * 64 + col * 2 + i % 2, row + 192 + i, 1);
    for (int half = 0; half < 2; ++half) {
      uint8_t* at = block + kQ6KHalvesOffset + half * kQ6KHalfBytes;
      copy.lanes(at, 512, col, row + 128 + half * 32, 32);
      for (int i = 0; i < 2; ++i) copy.lanes(at + 1024 + i * 1024, 512, col, row + half * 64 + i * 32, 32);
    }
    return;
  }
  copy.bytes(block + col * 2, row, 2);
  copy.bytes(block + 64 + col * 2, row + 2, 2);
  copy.six_bits(block, col, row + 4);
  const bool fifth = kind == BlockKind::kQ5K;
  if (fifth) copy.lanes(block + kBlockHeaderBytes, 512, col, row + 16, 32);
  uint8_t* codes = block + (fifth ? kQ5KCodesOffset : kBlockHeaderBytes);
  for (int i = 0; i < 4; ++i) copy.lanes(codes + i * 1024, 512, col, row + (fifth ? 48 : 16) + i * 32, 32);
}

void copy_row(const Copy& copy, const FormatInfo& info, int k, uint8_t* strip, int col, uint8_t* row) {
  const BlockKind kind = info.block_kind;
  const GgmlBlock ggml = ggml_block(kind);
  const int per_block = block_inputs(kind) / ggml.inputs, blocks = k / ggml.inputs;
  for (int i = 0; i < blocks; i += per_block) {
    copy_block(copy, kind, strip + static_cast<size_t>(i / per_block) * static_cast<size_t>(block_bytes(kind)), col,
               row + static_cast<size_t>(i) * static_cast<size_t>(ggml.bytes), std::min(per_block, blocks - i));
  }
}

struct Place {
  int strip, col;
};

void pack_rows(const StripShape& shape, int rows, const uint8_t* data, uint8_t* strips, float* scales,
               Place (*place)(int row)) {
  const size_t bytes = ggml_row_bytes(*shape.info, shape.k);
  std::vector<float> values(static_cast<size_t>(shape.k));
  check_ggml_scales(*shape.info, data, rows, shape.k);
  for (int r = 0; r < rows; ++r) {
    const Place at = place(r);
    scales[at.strip * kStripCols + at.col] =
        place_ggml_row(*shape.info, data + static_cast<size_t>(r) * bytes, shape.k,
                       strips + static_cast<size_t>(at.strip) * shape.strip_bytes(), at.col, values.data());
  }
}

void unpack_rows(const StripShape& shape, int rows, const uint8_t* strips, uint8_t* data, Place (*place)(int row)) {
  const size_t bytes = ggml_row_bytes(*shape.info, shape.k);
  std::memset(data, 0, static_cast<size_t>(rows) * bytes);
  for (int r = 0; r < rows; ++r) {
    const Place at = place(r);
    uint8_t* strip = const_cast<uint8_t*>(strips) + static_cast<size_t>(at.strip) * shape.strip_bytes();  // only read
    copy_row({false}, *shape.info, shape.k, strip, at.col, data + static_cast<size_t>(r) * bytes);
  }
}

Place gate_place(int r) { return {r / kTileCols, r % kTileCols}; }
Place up_place(int r) { return {r / kTileCols, kTileCols + r % kTileCols}; }
Place down_place(int r) { return {r / kStripCols, r % kStripCols}; }

}  // namespace

size_t ggml_row_bytes(const FormatInfo& info, int k) {
  const GgmlBlock ggml = ggml_block(info.block_kind);
  return static_cast<size_t>(k / ggml.inputs) * static_cast<size_t>(ggml.bytes);
}

void dequantize_row(const FormatInfo& info, const uint8_t* row, int k, float* out) {
  static const char* const kNames[] = {"", "Q4_K", "Q5_K", "Q6_K", "Q8_0"};  // by BlockKind
  const GgmlType& type = type_of_name(ggml_types(), kNames[static_cast<int>(info.block_kind)]);
  type.decode(row, static_cast<size_t>(k / type.block), out);
}

void check_ggml_scales(const FormatInfo& info, const uint8_t* data, int rows, int k) {
  const GgmlBlock ggml = ggml_block(info.block_kind);
  const uint8_t* block = data;
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < k / ggml.inputs; ++i, block += ggml.bytes) {
      if (is_finite_half(block + ggml.d) && (ggml.dmin < 0 || is_finite_half(block + ggml.dmin))) continue;
      throw std::invalid_argument("scale of the block at row " + std::to_string(r) + ", column " +
                                  std::to_string(i * ggml.inputs) + " is not a finite number");
    }
  }
}

float place_ggml_row(const FormatInfo& info, const uint8_t* row, int k, uint8_t* strip, int col, float* values) {
  copy_row({true}, info, k, strip, col, const_cast<uint8_t*>(row));  // only read
  dequantize_row(info, row, k, values);
  float largest = 0.0f;
  for (int i = 0; i < k; ++i) largest = std::fmax(largest, std::fabs(values[i]));
  return largest < 1e-30f ? 0.0f : largest / 127.0f;
}

void pack_ggml_expert(ExpertFormat format, int hidden_size, int moe_intermediate_size, const uint8_t* gate,
                      const uint8_t* up, const uint8_t* down, uint8_t* blob) {
  const ExpertShape shape(format, hidden_size, moe_intermediate_size);
  std::memset(blob, 0, shape.blob_bytes());
  auto* gate_up_scales = reinterpret_cast<float*>(blob + shape.gate_up_scales_offset());
  auto* down_scales = reinterpret_cast<float*>(blob + shape.down_scales_offset());
  pack_rows(shape.gate_up, moe_intermediate_size, gate, blob, gate_up_scales, gate_place);
  pack_rows(shape.gate_up, moe_intermediate_size, up, blob, gate_up_scales, up_place);
  pack_rows(shape.down, hidden_size, down, blob + shape.down_offset(), down_scales, down_place);
}

void unpack_ggml_expert(ExpertFormat format, int hidden_size, int moe_intermediate_size, const uint8_t* blob,
                        uint8_t* gate, uint8_t* up, uint8_t* down) {
  const ExpertShape shape(format, hidden_size, moe_intermediate_size);
  unpack_rows(shape.gate_up, moe_intermediate_size, blob, gate, gate_place);
  unpack_rows(shape.gate_up, moe_intermediate_size, blob, up, up_place);
  unpack_rows(shape.down, hidden_size, blob + shape.down_offset(), down, down_place);
}

}  // namespace kt
