#include "layout.h"

#include <stdexcept>

namespace kt {
namespace {

constexpr int kLargestSize = 1 << 20;  // of hidden_size, moe_intermediate_size and every dense matrix side

int checked_size(const char* what, int size) {
  if (size < 1 || size > kLargestSize) {
    throw std::invalid_argument(std::string(what) + " must be 1 to 1048576, got " + std::to_string(size));
  }
  return size;
}

}  // namespace

const std::vector<FormatInfo>& formats() {
  static const std::vector<FormatInfo> table = {
      {Format::kBf16, "bf16", 32, 0},
      {Format::kInt8, "int8", 64, 0},
      {Format::kInt4G32, "int4_g32", 64, 32},
      {Format::kInt4G64, "int4_g64", 64, 64},
      {Format::kInt4G128, "int4_g128", 64, 128},
  };
  return table;
}

const std::vector<FormatInfo>& block_formats() {
  static const std::vector<FormatInfo> table = {
      {Format::kQ4K, "q4_k", 64, 0, BlockKind::kQ4K},
      {Format::kQ5K, "q5_k", 64, 0, BlockKind::kQ5K},
      {Format::kQ6K, "q6_k", 64, 0, BlockKind::kQ6K},
      {Format::kQ8_0, "q8_0", 64, 0, BlockKind::kQ8_0},
  };
  return table;
}

const FormatInfo& format_info(Format format) {
  for (const std::vector<FormatInfo>* table : {&formats(), &block_formats()}) {
    for (const FormatInfo& info : *table) {
      if (info.format == format) return info;
    }
  }
  throw std::invalid_argument("unknown format id " + std::to_string(static_cast<uint32_t>(format)));
}

const FormatInfo& format_by_name(const std::string& name) {
  std::string valid;
  for (const FormatInfo& info : formats()) {
    if (name == info.name) return info;
    valid += (valid.empty() ? "" : ", ") + std::string(info.name);
  }
  throw std::invalid_argument("unknown format '" + name + "': expected one of " + valid);
}

std::string ExpertFormat::name() const {
  const std::string first = format_info(gate_up).name;
  return gate_up == down ? first : first + "_" + format_info(down).name;
}

std::vector<ExpertFormat> block_expert_formats() {
  std::vector<ExpertFormat> all;
  for (const FormatInfo& gate_up : block_formats()) {
    for (const FormatInfo& down : block_formats()) all.emplace_back(gate_up.format, down.format);
  }
  return all;
}

ExpertFormat expert_format_by_name(const std::string& name) {
  for (const ExpertFormat& format : block_expert_formats()) {
    if (name == format.name()) return format;
  }
  return format_by_name(name).format;
}

int FormatInfo::unit_inputs() const {
  if (is_block()) return block_inputs(block_kind);
  return k_group > k_per_step ? k_group : k_per_step;
}

size_t FormatInfo::unit_bytes() const {
  if (is_block()) return static_cast<size_t>(block_bytes(block_kind));
  return static_cast<size_t>(k_group ? int4_block_bytes(k_group) : kStripStepBytes);
}

ExpertShape::ExpertShape(ExpertFormat format, int hidden_size, int moe_intermediate_size)
    : gate_up{static_cast<int>(2 * round_up(checked_size("moe_intermediate_size", moe_intermediate_size), kTileCols)),
              checked_size("hidden_size", hidden_size), &format_info(format.gate_up)},
      down{hidden_size, moe_intermediate_size, &format_info(format.down)} {
  for (const StripShape* shape : {&gate_up, &down}) check_block_inputs(*shape->info, shape->k);
}

void check_block_inputs(const FormatInfo& info, int k) {
  const int inputs = info.is_block() ? ggml_block_inputs(info.block_kind) : 1;
  if (k % inputs == 0) return;
  throw std::invalid_argument(std::string(info.name) + " holds blocks of " + std::to_string(inputs) + " inputs; " +
                              std::to_string(k) + " do not fill them");
}

}  // namespace kt
