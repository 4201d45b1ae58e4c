// Blobs of strangers, for builds with sanitizers: whatever bytes a pack holds under right checksums, every kernel table reads
// inside of them only. Memory is exactly sized; weights, scales and headers are noise, NaN and extremes; activations and routing
// weights, too. Sizes at the limits of PACK.md must not overflow. Prints "ok"; the results are nonsense and not looked at.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "block_pack.h"
#include "dispatch.h"
#include "layout.h"
#include "moe.h"
#include "quantize.h"

namespace {

using kt::Engine;
using kt::ExpertFormat;
using kt::ExpertLayer;
using kt::ExpertShape;

constexpr int kExperts = 3;
constexpr int kLargest = 1 << 20;  // PACK.md, "Limits"

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "FAILED: %s\n", message.c_str());
  std::exit(1);
}

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

enum class Filling { kNoise, kOnes, kZeros, kSigns };

uint32_t next(uint32_t& state) {
  state ^= state << 13;
  state ^= state >> 17;
  return state ^= state << 5;
}

Memory blob(size_t bytes, Filling filling, uint32_t seed) {
  Memory memory(static_cast<uint8_t*>(std::aligned_alloc(4096, bytes)));
  if (!memory) fail("no memory");
  uint32_t state = seed * 2654435761u + 1;
  for (size_t i = 0; i < bytes; ++i) {
    const auto noise = static_cast<uint8_t>(next(state) >> 24);
    memory.get()[i] = filling == Filling::kNoise   ? noise
                      : filling == Filling::kOnes  ? 0xff
                      : filling == Filling::kSigns ? 0x80
                                                   : 0;
  }
  return memory;
}

std::vector<float> activations(size_t n) {
  const float odd[] = {0.0f, -0.0f, 1.5f, -3e38f, 3e38f, 1e-42f, NAN, INFINITY, -INFINITY, -1.0f};
  std::vector<float> out(n);
  for (size_t i = 0; i < n; ++i) out[i] = odd[(i * 7 + i / 13) % 10];
  return out;
}

void forward(ExpertLayer& layer, int tokens, int hidden, bool bf16) {
  const auto n = static_cast<size_t>(tokens) * static_cast<size_t>(hidden);
  const std::vector<float> x = activations(n);
  std::vector<uint16_t> half(n);
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x[i], sizeof bits);
    half[i] = static_cast<uint16_t>(bits >> 16);
  }
  std::vector<int64_t> ids;
  for (int i = 0; i < tokens * 2; ++i) ids.push_back(i % 4 == 3 ? -1 : i % kExperts);
  const std::vector<float> weights = activations(ids.size());
  std::vector<float> out(n);
  const void* input = bf16 ? static_cast<const void*>(half.data()) : x.data();
  layer.forward({input, bf16, tokens, hidden}, {ids.data(), weights.data(), 2}, out.data());
}

void check(const std::shared_ptr<Engine>& engine, ExpertFormat format, int hidden, int inner, Filling filling) {
  const size_t bytes = ExpertShape(format, hidden, inner).blob_bytes();
  std::vector<Memory> memory;
  std::vector<kt::ExpertBlob> blobs;
  for (uint32_t e = 0; e < kExperts; ++e) {
    memory.push_back(blob(bytes, filling, e + 1));
    blobs.push_back({format, memory.back().get()});
  }
  ExpertLayer layer(engine, hidden, inner, blobs);
  for (int tokens : {1, 5, 33}) {
    for (bool bf16 : {false, true}) forward(layer, tokens, hidden, bf16);
  }
  const size_t n = static_cast<size_t>(hidden) * static_cast<size_t>(inner);
  std::vector<float> gate(n), up(n), down(n);
  kt::unpack_expert(format, memory[0].get(), hidden, inner, gate.data(), up.data(), down.data());
}

void check_format(const std::shared_ptr<Engine>& engine, ExpertFormat format, bool is_block) {
  const std::vector<std::pair<int, int>> any = {{72, 40}, {1, 1}, {129, 17}};
  const std::vector<std::pair<int, int>> blocks = {{256, 256}, {512, 256}};
  for (const auto& [hidden, inner] : is_block ? blocks : any) {
    for (Filling filling : {Filling::kNoise, Filling::kOnes, Filling::kZeros, Filling::kSigns}) {
      check(engine, format, hidden, inner, filling);
    }
  }
}

// The largest sizes a header may give: nothing overflows, and the blob is at least as large as its weights.
void check_limits(ExpertFormat format) {
  const size_t bytes = ExpertShape(format, kLargest, kLargest).blob_bytes();
  const size_t weights = 3 * static_cast<size_t>(kLargest) * static_cast<size_t>(kLargest);
  if (bytes < weights / 2 || bytes > 3 * weights) fail(format.name() + ": absurd size at the limits");
}

void check_misaligned(const std::shared_ptr<Engine>& engine) {
  const ExpertFormat format(kt::Format::kInt8);
  const size_t bytes = ExpertShape(format, 64, 32).blob_bytes();
  const Memory memory = blob(bytes + 4096, Filling::kNoise, 1);
  try {
    ExpertLayer layer(engine, 64, 32, {{format, memory.get() + 1}});
    fail("a misaligned blob was accepted");
  } catch (const std::invalid_argument&) {
  }
}

}  // namespace

int main() {
  for (const kt::IsaStatus& isa : kt::isa_status()) {
    if (!isa.missing.empty()) continue;
    const auto engine = std::make_shared<Engine>(2, isa.table->name);
    for (const kt::FormatInfo& info : kt::formats()) check_format(engine, info.format, false);
    for (const ExpertFormat& format : kt::block_expert_formats()) check_format(engine, format, true);
    check_misaligned(engine);
  }
  for (const kt::FormatInfo& info : kt::formats()) check_limits(info.format);
  for (const ExpertFormat& format : kt::block_expert_formats()) check_limits(format);
  std::printf("ok\n");
  return 0;
}
