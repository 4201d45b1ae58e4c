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

const FormatInfo& format_info(Format format) {
  for (const FormatInfo& info : formats()) {
    if (info.format == format) return info;
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

int StripShape::k_padded() const {
  const int unit = info->k_group > info->k_per_step ? info->k_group : info->k_per_step;
  return static_cast<int>(round_up(k, unit));
}

size_t StripShape::strip_bytes() const {
  if (info->k_group == 0) return static_cast<size_t>(k_steps()) * kStripStepBytes;
  return static_cast<size_t>(k_steps() / int4_block_steps(info->k_group)) * int4_block_bytes(info->k_group);
}

ExpertShape::ExpertShape(Format format, int hidden_size, int moe_intermediate_size)
    : gate_up{static_cast<int>(2 * round_up(checked_size("moe_intermediate_size", moe_intermediate_size), kTileCols)),
              checked_size("hidden_size", hidden_size), &format_info(format)},
      down{hidden_size, moe_intermediate_size, &format_info(format)} {}

}  // namespace kt
