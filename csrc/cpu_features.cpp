#include "cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kt {

const std::vector<FeatureName>& feature_names() {
  static const std::vector<FeatureName> names = {
      {kAvx2, "avx2"},
      {kFma, "fma"},
      {kF16c, "f16c"},
      {kAvx512f, "avx512f"},
      {kAvx512bw, "avx512bw"},
      {kAvx512dq, "avx512dq"},
      {kAvx512vl, "avx512vl"},
      {kAvx512vnni, "avx512_vnni"},
      {kAvx512bf16, "avx512_bf16"},
      {kAmxTile, "amx_tile"},
      {kAmxInt8, "amx_int8"},
      {kAmxBf16, "amx_bf16"},
      {kAmxPermission, "amx_permission"},
  };
  return names;
}

namespace {

#if defined(__x86_64__)

constexpr uint64_t kXcr0Avx = 0x6;      // SSE and AVX state
constexpr uint64_t kXcr0Avx512 = 0xe0;  // opmask, ZMM_Hi256, Hi16_ZMM
constexpr uint64_t kXcr0Amx = 0x60000;  // TILECFG and TILEDATA

uint64_t read_xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux gives AMX tile data to a process only on request (Documentation/arch/x86/xstate.rst).
bool request_amx_permission() {
#if defined(__linux__)
  constexpr int kArchGetXcompPerm = 0x1022;
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kXfeatureTileData = 18;
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) != 0) return false;
  uint64_t granted = 0;
  return syscall(SYS_arch_prctl, kArchGetXcompPerm, &granted) == 0 && ((granted >> kXfeatureTileData) & 1);
#else
  return false;
#endif
}

uint64_t detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const bool has_osxsave = (c >> 27) & 1;
  const uint64_t xcr0 = has_osxsave ? read_xcr0() : 0;
  const bool avx_state = (xcr0 & kXcr0Avx) == kXcr0Avx;
  const bool avx512_state = avx_state && (xcr0 & kXcr0Avx512) == kXcr0Avx512;
  const bool amx_state = (xcr0 & kXcr0Amx) == kXcr0Amx;
  uint64_t found = 0;
  const auto add = [&found](bool present, uint64_t bit) { found |= present ? bit : 0; };
  add(avx_state && ((c >> 12) & 1), kFma);
  add(avx_state && ((c >> 29) & 1), kF16c);
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    add(avx_state && ((b >> 5) & 1), kAvx2);
    add(avx512_state && ((b >> 16) & 1), kAvx512f);
    add(avx512_state && ((b >> 17) & 1), kAvx512dq);
    add(avx512_state && ((b >> 30) & 1), kAvx512bw);
    add(avx512_state && ((b >> 31) & 1), kAvx512vl);
    add(avx512_state && ((c >> 11) & 1), kAvx512vnni);
    add(amx_state && ((d >> 22) & 1), kAmxBf16);
    add(amx_state && ((d >> 24) & 1), kAmxTile);
    add(amx_state && ((d >> 25) & 1), kAmxInt8);
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) add(avx512_state && ((a >> 5) & 1), kAvx512bf16);
  if (found & kAmxTile) add(request_amx_permission(), kAmxPermission);
  return found;
}

#else

uint64_t detect() { return 0; }

#endif

}  // namespace

uint64_t cpu_features() {
  static const uint64_t found = detect();
  return found;
}

std::vector<std::string> missing_features(uint64_t required, uint64_t have) {
  std::vector<std::string> missing;
  for (const FeatureName& feature : feature_names()) {
    if ((required & feature.bit) && !(have & feature.bit)) missing.push_back(feature.name);
  }
  return missing;
}

}  // namespace kt
