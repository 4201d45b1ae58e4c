// Where things lie inside the blob of one expert and inside the strips of one matrix (PACK.md, "Blob layout").
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "blocks.h"
#include "kernels.h"

namespace kt {

enum class Format : uint32_t {
  kBf16 = 1,
  kInt8 = 2,
  kInt4G32 = 3,
  kInt4G64 = 4,
  kInt4G128 = 5,
  kQ4K = 6,
  kQ5K = 7,
  kQ6K = 8,
  kQ8_0 = 9,
};

struct FormatInfo {
  Format format;
  const char* name;
  int k_per_step;  // input features in one 64-byte k-step of int8 or bf16 activations
  int k_group;     // int4: input features per group; else 0
  BlockKind block_kind = BlockKind::kNone;

  bool is_block() const { return block_kind != BlockKind::kNone; }
  // Whether tiles have to be made of the stored weights before they can be multiplied.
  bool is_expanded() const { return k_group != 0 || is_block(); }
  // A strip is a row of units, none of which can be read in part: a k-step, a group of int4, a block.
  int unit_inputs() const;
  int unit_steps() const { return unit_inputs() / k_per_step; }
  size_t unit_bytes() const;  // for the 32 columns of a strip
};

const std::vector<FormatInfo>& formats();        // what weights can be quantised to
const std::vector<FormatInfo>& block_formats();  // ggml's blocks, kept as they are
const FormatInfo& format_info(Format format);
// One of formats(). Throws std::invalid_argument listing the names.
const FormatInfo& format_by_name(const std::string& name);

// The formats of an expert's two multiplications. They differ only among the block formats, as files of llama.cpp mix them.
struct ExpertFormat {
  Format gate_up;
  Format down;

  ExpertFormat(Format both) : gate_up(both), down(both) {}
  ExpertFormat(Format gate_up_format, Format down_format) : gate_up(gate_up_format), down(down_format) {}
  uint32_t id() const {  // PACK.md, "Formats"
    return static_cast<uint32_t>(gate_up) | (gate_up == down ? 0 : static_cast<uint32_t>(down) << 8);
  }
  std::string name() const;
};

std::vector<ExpertFormat> block_expert_formats();
// Any of formats() or block_expert_formats(). Throws std::invalid_argument.
ExpertFormat expert_format_by_name(const std::string& name);

constexpr size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

// The strips of one matrix of N weight rows and K input features.
struct StripShape {
  int n;
  int k;
  const FormatInfo* info;

  int strips() const { return static_cast<int>(round_up(n, kStripCols) / kStripCols); }
  int k_padded() const { return static_cast<int>(round_up(k, static_cast<size_t>(info->unit_inputs()))); }
  int k_steps() const { return k_padded() / info->k_per_step; }
  size_t strip_bytes() const { return static_cast<size_t>(k_padded() / info->unit_inputs()) * info->unit_bytes(); }
  size_t bytes() const { return strips() * strip_bytes(); }
  bool has_scales() const { return info->format != Format::kBf16; }  // one per row
};

// Throws std::invalid_argument for a block format whose blocks k inputs do not fill.
void check_block_inputs(const FormatInfo& info, int k);

// Sections of an expert blob, in file order. gate_up: a strip holds 16 gate rows and the 16 up rows of the same
// intermediate features, so its N is 2 * round_up(moe_intermediate_size, 16).
struct ExpertShape {
  StripShape gate_up;
  StripShape down;

  ExpertShape(ExpertFormat format, int hidden_size, int moe_intermediate_size);
  size_t down_offset() const { return gate_up.bytes(); }
  size_t gate_up_scales_offset() const { return down_offset() + down.bytes(); }
  size_t down_scales_offset() const { return gate_up_scales_offset() + scales_bytes(gate_up); }
  size_t blob_bytes() const { return round_up(down_scales_offset() + scales_bytes(down), 4096); }

  static size_t scales_bytes(const StripShape& shape) {
    return shape.has_scales() ? static_cast<size_t>(shape.strips()) * kStripCols * sizeof(float) : 0;
  }
};

}  // namespace kt
