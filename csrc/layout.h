// Where things lie inside the blob of one expert and inside the strips of one matrix (PACK.md, "Blob layout").
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace kt {

enum class Format : uint32_t { kBf16 = 1, kInt8 = 2, kInt4G32 = 3, kInt4G64 = 4, kInt4G128 = 5 };

struct FormatInfo {
  Format format;
  const char* name;
  int k_per_step;  // input features in one 64-byte k-step of int8 or bf16 activations
  int k_group;     // int4: input features per group; else 0
};

const std::vector<FormatInfo>& formats();
const FormatInfo& format_info(Format format);
// Throws std::invalid_argument listing the names.
const FormatInfo& format_by_name(const std::string& name);

constexpr size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

// The strips of one matrix of N weight rows and K input features.
struct StripShape {
  int n;
  int k;
  const FormatInfo* info;

  int strips() const { return static_cast<int>(round_up(n, kStripCols) / kStripCols); }
  int k_padded() const;
  int k_steps() const { return k_padded() / info->k_per_step; }
  size_t strip_bytes() const;
  size_t bytes() const { return strips() * strip_bytes(); }
  bool has_scales() const { return info->format != Format::kBf16; }
};

// Sections of an expert blob, in file order. gate_up: a strip holds 16 gate rows and the 16 up rows of the same
// intermediate features, so its N is 2 * round_up(moe_intermediate_size, 16).
struct ExpertShape {
  StripShape gate_up;
  StripShape down;

  ExpertShape(Format format, int hidden_size, int moe_intermediate_size);
  size_t down_offset() const { return gate_up.bytes(); }
  size_t gate_up_scales_offset() const { return down_offset() + down.bytes(); }
  size_t down_scales_offset() const { return gate_up_scales_offset() + scales_bytes(gate_up); }
  size_t blob_bytes() const { return round_up(down_scales_offset() + scales_bytes(down), 4096); }

  static size_t scales_bytes(const StripShape& shape) {
    return shape.has_scales() ? static_cast<size_t>(shape.strips()) * kStripCols * sizeof(float) : 0;
  }
};

}  // namespace kt
