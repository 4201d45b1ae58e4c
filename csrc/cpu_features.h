// What this CPU and this kernel let us execute: CPUID, XCR0 and the AMX permission.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kt {

enum Feature : uint64_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kAvx512f = 1u << 3,
  kAvx512bw = 1u << 4,
  kAvx512dq = 1u << 5,
  kAvx512vl = 1u << 6,
  kAvx512vnni = 1u << 7,
  kAvx512bf16 = 1u << 8,
  kAmxTile = 1u << 9,
  kAmxInt8 = 1u << 10,
  kAmxBf16 = 1u << 11,
  kAmxPermission = 1u << 12,
};

struct FeatureName {
  uint64_t bit;
  const char* name;
};

// Every feature with its printed name, in a fixed order.
const std::vector<FeatureName>& feature_names();

// Bits usable here; asks the OS for AMX state on the first call.
uint64_t cpu_features();

// The names of the bits of `required` that `have` lacks.
std::vector<std::string> missing_features(uint64_t required, uint64_t have);

}  // namespace kt
