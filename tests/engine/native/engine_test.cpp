// The engine without Python, for builds with sanitizers: every kernel table of this CPU on exactly sized memory, rows of
// every tile shape, concurrent callers, engines that come and go. Prints a hash of each format's blob for the caller to
// compare, and "ok"; exits 1 at the first mismatch.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "block_pack.h"
#include "dispatch.h"
#include "gqa_step.h"
#include "latent_step.h"
#include "linear.h"
#include "moe.h"
#include "step.h"

namespace {

using kt::Engine;
using kt::ExpertLayer;
using kt::ExpertShape;
using kt::Format;
using kt::FormatInfo;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "FAILED: %s\n", message.c_str());
  std::exit(1);
}

void expect(bool holds, const std::string& message) {
  if (!holds) fail(message);
}

// Element i of stream `seed`: a float in [-1, 1) with 16 bits, the same in any language (see test_sanitizers.py).
float value(uint32_t seed, uint32_t i) {
  uint32_t h = i * 2654435761u + seed * 40503u;
  h ^= h >> 15;
  h *= 2246822519u;
  h ^= h >> 13;
  return (static_cast<float>(h >> 16) - 32768.0f) / 32768.0f;
}

std::vector<float> values(uint32_t seed, size_t n, float scale) {
  std::vector<float> out(n);
  for (size_t i = 0; i < n; ++i) out[i] = value(seed, static_cast<uint32_t>(i)) * scale;
  return out;
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};

// One expert: its blob in memory of exactly that size, and the weights that it stands for.
struct Expert {
  kt::ExpertFormat format;
  int hidden, inner;
  size_t bytes;
  std::unique_ptr<uint8_t, Free> blob;
  std::vector<float> gate, up, down;

  Expert(Format f, int hidden_size, int inner_size, uint32_t seed)
      : format(f),
        hidden(hidden_size),
        inner(inner_size),
        bytes(ExpertShape(f, hidden, inner).blob_bytes()),
        blob(static_cast<uint8_t*>(std::aligned_alloc(4096, bytes))) {
    const size_t n = static_cast<size_t>(hidden) * static_cast<size_t>(inner);
    const float in = 1.7f / std::sqrt(static_cast<float>(hidden)), out = 1.7f / std::sqrt(static_cast<float>(inner));
    gate = values(seed, n, in);
    up = values(seed + 1, n, in);
    down = values(seed + 2, n, out);
    kt::pack_expert(f, {gate.data(), false, inner, hidden}, {up.data(), false, inner, hidden},
                    {down.data(), false, hidden, inner}, blob.get());
    kt::unpack_expert(f, blob.get(), hidden, inner, gate.data(), up.data(), down.data());
  }

  // Of random ggml blocks; they must come back unchanged.
  Expert(kt::ExpertFormat f, int hidden_size, int inner_size, uint32_t seed, int)
      : format(f),
        hidden(hidden_size),
        inner(inner_size),
        bytes(ExpertShape(f, hidden, inner).blob_bytes()),
        blob(static_cast<uint8_t*>(std::aligned_alloc(4096, bytes))) {
    const std::vector<uint8_t> g = ggml_rows(f.gate_up, inner, hidden, seed);
    const std::vector<uint8_t> u = ggml_rows(f.gate_up, inner, hidden, seed + 1);
    const std::vector<uint8_t> d = ggml_rows(f.down, hidden, inner, seed + 2);
    kt::pack_ggml_expert(f, hidden, inner, g.data(), u.data(), d.data(), blob.get());
    std::vector<uint8_t> g2(g.size()), u2(u.size()), d2(d.size());
    kt::unpack_ggml_expert(f, hidden, inner, blob.get(), g2.data(), u2.data(), d2.data());
    expect(g == g2 && u == u2 && d == d2, f.name() + ": blocks come back changed");
    const size_t n = static_cast<size_t>(hidden) * static_cast<size_t>(inner);
    gate.resize(n);
    up.resize(n);
    down.resize(n);
    kt::unpack_expert(f, blob.get(), hidden, inner, gate.data(), up.data(), down.data());
  }

  // Random codes and integer scales; the float16 scales (0x14.. and 0x18.., about 0.001 and 0.003) are small and finite.
  static std::vector<uint8_t> ggml_rows(Format f, int rows, int k, uint32_t seed) {
    const FormatInfo& info = kt::format_info(f);
    const size_t row_bytes = kt::ggml_row_bytes(info, k);
    std::vector<uint8_t> out(static_cast<size_t>(rows) * row_bytes);
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<uint8_t>(static_cast<int>(value(seed, static_cast<uint32_t>(i)) * 32768.0f) >> 3);
    }
    const size_t block = f == Format::kQ4K ? 144 : f == Format::kQ5K ? 176 : f == Format::kQ6K ? 210 : 34;
    const size_t d = f == Format::kQ6K ? 208 : 0;
    for (size_t at = 0; at < out.size(); at += block) {
      out[at + d + 1] = 0x0c;
      if (f == Format::kQ4K || f == Format::kQ5K) out[at + 3] = 0x10;
    }
    return out;
  }
};

// Plain double arithmetic on the stored weights, nothing else rounded.
std::vector<double> plain_expert(const Expert& e, const float* x) {
  std::vector<double> h(static_cast<size_t>(e.inner)), y(static_cast<size_t>(e.hidden), 0.0);
  for (int i = 0; i < e.inner; ++i) {
    double gate = 0, up = 0;
    for (int k = 0; k < e.hidden; ++k) {
      gate += static_cast<double>(e.gate[i * e.hidden + k]) * x[k];
      up += static_cast<double>(e.up[i * e.hidden + k]) * x[k];
    }
    h[i] = gate / (1.0 + std::exp(-gate)) * up;
  }
  for (int n = 0; n < e.hidden; ++n) {
    for (int i = 0; i < e.inner; ++i) y[n] += h[i] * e.down[n * e.inner + i];
  }
  return y;
}

// Largest error allowed as a share of the largest value. Activations in int8: two roundings of half a step of 1/127 whose
// errors add over the row like noise, measured 1 %. bf16 activations: 2^-8 of the hidden row. Else float32 sums.
double tolerance(kt::ExpertFormat format, bool bf16_input) {
  if (format.gate_up != Format::kBf16) return 0.04;
  return bf16_input ? 0.01 : 1e-5;
}

struct Problem {
  std::vector<float> x;
  std::vector<uint16_t> x_bf16;
  std::vector<int64_t> ids;
  std::vector<float> weights;
  int tokens, k, hidden;

  // Every third id is -1 and its weight NaN; tokens 4, 9, ... have no expert at all and are NaN.
  Problem(int tokens_, int k_, int experts, int hidden_) : tokens(tokens_), k(k_), hidden(hidden_) {
    x = values(77, static_cast<size_t>(tokens) * static_cast<size_t>(hidden), 1.7f);
    for (float& v : x) v = from_bf16(to_bf16(v));
    for (int t = 0; t < tokens; ++t) {
      for (int r = 0; r < k; ++r) {
        const bool none = t % 5 == 4 || (k > 1 && (t + r) % 3 == 2);
        ids.push_back(none ? -1 : (t * 7 + r) % experts);
        weights.push_back(none ? NAN : 0.5f + 0.125f * static_cast<float>(r));
      }
      if (t % 5 == 4) std::fill_n(x.begin() + static_cast<int64_t>(t) * hidden, hidden, NAN);
    }
    for (float v : x) x_bf16.push_back(std::isnan(v) ? 0x7fc0 : to_bf16(v));
  }

  kt::Input input(bool bf16) const {
    return {bf16 ? static_cast<const void*>(x_bf16.data()) : x.data(), bf16, tokens, hidden};
  }
  std::vector<float> run(ExpertLayer& layer, bool bf16) const {
    std::vector<float> out(static_cast<size_t>(tokens) * static_cast<size_t>(hidden), NAN);
    layer.forward(input(bf16), {ids.data(), weights.data(), k}, out.data());
    return out;
  }
  std::vector<double> plain(const std::vector<Expert>& experts) const {
    std::vector<double> y(static_cast<size_t>(tokens) * static_cast<size_t>(hidden), 0.0);
    for (int t = 0; t < tokens; ++t) {
      for (int r = 0; r < k; ++r) {
        if (ids[t * k + r] < 0) continue;
        const std::vector<double> part =
            plain_expert(experts[ids[t * k + r]], x.data() + static_cast<size_t>(t) * hidden);
        for (int n = 0; n < hidden; ++n) y[t * hidden + n] += part[n] * weights[t * k + r];
      }
    }
    return y;
  }
};

std::vector<Expert> make_experts(Format format, int count, int hidden, int inner) {
  std::vector<Expert> experts;
  for (int e = 0; e < count; ++e) experts.emplace_back(format, hidden, inner, 100 + 3 * static_cast<uint32_t>(e));
  return experts;
}

ExpertLayer make_layer(std::shared_ptr<Engine> engine, const std::vector<Expert>& experts) {
  std::vector<kt::ExpertBlob> blobs;
  for (const Expert& e : experts) blobs.push_back({e.format, e.blob.get()});
  return ExpertLayer(std::move(engine), experts[0].hidden, experts[0].inner, std::move(blobs));
}

void compare(const std::vector<float>& got, const std::vector<double>& expected, double share,
             const std::string& what) {
  double largest = 0;
  for (double v : expected) largest = std::fmax(largest, std::fabs(v));
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(got[i] - expected[i]);
    if (!(error <= share * largest)) {
      fail(what + ": element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", expected " +
           std::to_string(expected[i]));
    }
  }
}

void check_experts(const std::string& isa, const std::vector<Expert>& experts, const std::vector<int>& token_counts) {
  const kt::ExpertFormat format = experts[0].format;
  const int hidden = experts[0].hidden;
  ExpertLayer one = make_layer(std::make_shared<Engine>(1, isa), experts);
  ExpertLayer three = make_layer(std::make_shared<Engine>(3, isa), experts);
  for (int tokens : token_counts) {
    for (int k : {1, 3}) {
      const Problem problem(tokens, k, 3, hidden);
      const std::vector<double> expected = problem.plain(experts);
      for (bool bf16 : {false, true}) {
        const std::string what =
            isa + " " + format.name() + " " + std::to_string(tokens) + " tokens of " + std::to_string(hidden);
        const std::vector<float> out = problem.run(one, bf16);
        compare(out, expected, tolerance(format, bf16), what);
        expect(std::memcmp(out.data(), problem.run(three, bf16).data(), out.size() * sizeof(float)) == 0,
               what + ": three threads give other bits than one");
      }
    }
  }
}

void check_layer(const std::string& isa, const FormatInfo& info, int hidden, int inner, std::vector<int> token_counts) {
  check_experts(isa, make_experts(info.format, 3, hidden, inner), token_counts);
}

void check_blocks(const std::string& isa, kt::ExpertFormat format, int hidden, int inner,
                  std::vector<int> token_counts) {
  std::vector<Expert> experts;
  for (uint32_t e = 0; e < 3; ++e) experts.emplace_back(format, hidden, inner, 200 + 3 * e, 0);
  check_experts(isa, experts, token_counts);
}

void check_linear(const std::string& isa, const FormatInfo& info, int n, int k) {
  const std::vector<float> w = values(9, static_cast<size_t>(n) * static_cast<size_t>(k), 0.3f);
  const size_t padded = kt::round_up(k, 128), rows = static_cast<size_t>(n);
  std::vector<uint8_t> q(rows * padded * 2), s(rows * padded / 32), z(s.size());
  std::vector<float> scale(rows);
  const kt::MatrixView view = {w.data(), false, n, k};
  if (info.format == Format::kBf16) {
    for (size_t i = 0; i < w.size(); ++i) reinterpret_cast<uint16_t*>(q.data())[i] = to_bf16(w[i]);
  } else if (info.k_group) {
    kt::quantize_int4(view, info.k_group, q.data(), s.data(), z.data(), scale.data());
  } else {
    kt::quantize_int8(view, reinterpret_cast<int8_t*>(q.data()), scale.data());
  }
  kt::PackedLinear linear(std::make_shared<Engine>(2, isa), info.format, {q.data(), s.data(), z.data(), n, k},
                          info.format == Format::kBf16 ? nullptr : scale.data());
  for (int m : {1, 2, 5, 34}) {
    const std::vector<float> x = values(10, static_cast<size_t>(m) * static_cast<size_t>(k), 1.0f);
    std::vector<double> expected(static_cast<size_t>(m) * rows, 0.0);
    for (int r = 0; r < m; ++r) {
      for (int c = 0; c < n; ++c) {
        for (int i = 0; i < k; ++i) expected[r * n + c] += static_cast<double>(x[r * k + i]) * w[c * k + i];
      }
    }
    const std::string what = isa + " " + info.name + " matrix " + std::to_string(n) + "x" + std::to_string(k);
    std::vector<float> wide(expected.size(), NAN);
    linear.forward({x.data(), false, m, k}, {wide.data(), static_cast<size_t>(n)});
    compare(wide, expected, info.k_group ? 0.2 : 0.02, what);
    std::vector<uint16_t> half(expected.size(), 0xffff);
    linear.forward({x.data(), false, m, k}, {half.data(), static_cast<size_t>(n), true});
    for (size_t i = 0; i < half.size(); ++i) expect(half[i] == to_bf16(wide[i]), what + ": bf16 output");
  }
}

// What a caller may get wrong is thrown, not computed.
void check_refusals() {
  const std::vector<Expert> experts = make_experts(Format::kInt8, 2, 64, 32);
  ExpertLayer layer = make_layer(std::make_shared<Engine>(2, ""), experts);
  Problem problem(40, 2, 2, 64);
  problem.ids[79] = 2;
  try {
    problem.run(layer, false);
    fail("id 2 of 2 experts was accepted");
  } catch (const std::invalid_argument&) {
  }
  try {
    Engine engine(1, "no such table");
    fail("an unknown kernel table was accepted");
  } catch (const std::invalid_argument&) {
  }
}

// Several threads on one engine while others are made and destroyed: the same bits as alone.
void check_callers() {
  const std::vector<Expert> experts = make_experts(Format::kInt8, 3, 320, 96);
  const auto engine = std::make_shared<Engine>(3, "");
  ExpertLayer first = make_layer(engine, experts), second = make_layer(engine, experts);
  const Problem problem(19, 2, 3, 320);
  const std::vector<float> expected = problem.run(first, false);
  const auto same = [&](ExpertLayer& layer) {
    expect(std::memcmp(problem.run(layer, false).data(), expected.data(), expected.size() * sizeof(float)) == 0,
           "concurrent callers got other bits");
  };
  const auto caller = [&](ExpertLayer& layer) {
    for (int i = 0; i < 20; ++i) same(layer);
  };
  std::thread a([&] { caller(first); }), b([&] { caller(second); });
  for (int i = 0; i < 12; ++i) {
    ExpertLayer passing = make_layer(std::make_shared<Engine>(1 + i % 7, ""), experts);
    if (i % 2) same(passing);
  }
  a.join();
  b.join();
}

uint64_t fnv1a(const uint8_t* data, size_t bytes) {
  uint64_t hash = 1469598103934665603u;
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ data[i]) * 1099511628211u;
  return hash;
}

void check_table(const std::string& isa) {
  for (const FormatInfo& info : kt::formats()) {
    check_layer(isa, info, 72, 40, {1, 2, 3, 18, 37, 70});
    check_layer(isa, info, 33, 17, {1, 5});
    check_linear(isa, info, 33, 100);
    check_linear(isa, info, 70, 129);
    if (isa != "scalar") check_layer(isa, info, 2400, 16, {530});  // K in blocks
  }
  for (Format format : {Format::kQ4K, Format::kQ5K, Format::kQ6K}) check_blocks(isa, format, 512, 256, {1, 7, 30});
  check_blocks(isa, Format::kQ8_0, 96, 32, {1, 3, 10, 37});
  check_blocks(isa, {Format::kQ4K, Format::kQ6K}, 256, 256, {2, 5, 21});
  check_blocks(isa, {Format::kQ6K, Format::kQ8_0}, 256, 32, {1, 3, 40});
  if (isa == "amx") check_blocks(isa, {Format::kQ4K, Format::kQ8_0}, 2560, 32, {530});
}

}  // namespace

// Decode steps of odd sizes on exactly sized memory: two layers' halves, 3 tokens, then 1.
struct SmallModel {
  static constexpr int kHidden = 37, kHeads = 5, kNope = 7, kRope = 6, kValue = 9, kLatent = 19, kRank = 21;
  static constexpr int kInner = 23, kExperts = 12, kTokens = 4;

  std::shared_ptr<Engine> engine;
  std::vector<std::unique_ptr<kt::PackedLinear>> linears;
  std::vector<uint16_t> up_key = half(50, kHeads * kNope * kLatent), up_value = half(51, kHeads * kValue * kLatent);
  std::vector<float> router_weight = values(52, kExperts* kHidden, 1.0f);
  std::vector<std::unique_ptr<Expert>> experts;

  static std::vector<uint16_t> half(uint32_t seed, size_t n) {
    std::vector<uint16_t> out(n);
    for (size_t i = 0; i < n; ++i) out[i] = to_bf16(value(seed, static_cast<uint32_t>(i)));
    return out;
  }

  explicit SmallModel(int threads) : engine(std::make_shared<Engine>(threads, "")) {
    for (int e = 0; e < kExperts; ++e) {
      experts.push_back(std::make_unique<Expert>(e % 2 ? Format::kInt8 : Format::kBf16, kHidden, kInner, 60u + e));
    }
  }

  kt::PackedLinear* linear(int n, int k) {
    const std::vector<uint16_t> w = half(static_cast<uint32_t>(n * 100 + k), static_cast<size_t>(n) * k);
    const kt::CodeView codes = {w.data(), nullptr, nullptr, n, k};
    linears.push_back(std::make_unique<kt::PackedLinear>(engine, Format::kBf16, codes, nullptr));
    return linears.back().get();
  }

  static kt::Norm norm(int size) {
    const std::vector<float> ones(static_cast<size_t>(size), std::sqrt(static_cast<float>(size)));
    return kt::Norm(ones.data(), size, 1e-6f * static_cast<float>(size));
  }

  std::unique_ptr<kt::GatedMlp> mlp() {
    const kt::LinearPair gate_up(linear(kInner, kHidden), linear(kInner, kHidden));
    return std::make_unique<kt::GatedMlp>(engine, gate_up, linear(kHidden, kInner));
  }

  // Grouped-query attention of a few tokens at the end of a context of several parts, with everything a family may have.
  std::vector<float> run_groups(int dim) {
    constexpr int kStart = 1300, kRows = 3;
    const kt::GqaShape shape = {6, 2, dim, 8, 900};
    kt::GqaExtras extras = {values(57, static_cast<size_t>(shape.projected()), 0.1f), norm(dim), norm(dim),
                            values(58, 6, 1.0f), values(59, kHidden, 0.1f)};
    kt::GqaStep step(engine, shape, 0.2f, norm(kHidden), {linear(shape.projected(), kHidden)},
                     linear(kHidden, shape.queries()), std::move(extras));
    std::vector<uint16_t> cache = half(60, static_cast<size_t>((kStart + kRows) * shape.cached()));
    std::vector<float> hidden = values(61, kRows * kHidden, 1.0f), turns = values(62, kRows * shape.rope, 1.0f);
    step.forward(hidden.data(), kRows, turns.data(), cache.data(), kStart);
    return hidden;
  }

  std::vector<float> run() {
    const kt::LatentShape shape = {kHeads, kNope, kRope, kValue, kLatent};
    kt::LatentStep attention(engine, shape, 0.3f, {up_key.data(), up_value.data()}, norm(kHidden),
                             kt::LinearPair(linear(kRank + shape.cached(), kHidden), nullptr),
                             std::make_unique<kt::Norm>(norm(kRank)), linear(kHeads * shape.key(), kRank),
                             norm(kLatent), linear(kHidden, kHeads * kValue));
    std::vector<kt::ExpertBlob> blobs;
    for (const auto& expert : experts) blobs.push_back({expert->format, expert->blob.get()});
    ExpertLayer layer(engine, kHidden, kInner, blobs);
    const kt::RouterShape routing = {kt::RouterKind::kSigmoidBiasGroups, kExperts, kHidden, 3, 2, 4, true, 2.5f};
    kt::Router router(engine, routing, router_weight.data(), values(53, kExperts, 0.1f));
    kt::MoeStep moe(engine, norm(kHidden), &router, &layer, mlp(), values(54, kHidden, 1.0f));
    kt::DenseStep dense(engine, norm(kHidden), std::move(*mlp()));
    std::vector<uint16_t> cache(static_cast<size_t>(kTokens * shape.cached()));
    std::vector<float> hidden = values(55, kTokens * kHidden, 1.0f), turns = values(56, kTokens * kRope, 1.0f);
    for (const auto& [start, rows] : {std::pair{0, 3}, std::pair{3, 1}}) {
      float* at = hidden.data() + start * kHidden;
      attention.forward(at, rows, turns.data() + start * kRope, cache.data(), start);
      dense.forward(at, rows);
      moe.forward(at, rows);
    }
    return hidden;
  }
};

void check_same(const std::vector<float>& one, const std::vector<float>& three) {
  for (float x : one) expect(std::isfinite(x), "a step gave a number that is not finite");
  expect(std::memcmp(one.data(), three.data(), one.size() * sizeof(float)) == 0, "steps depend on the threads");
}

void check_steps() {
  check_same(SmallModel(1).run(), SmallModel(3).run());
  for (const int dim : {24, 32}) check_same(SmallModel(1).run_groups(dim), SmallModel(3).run_groups(dim));
}

int main() {
  for (const FormatInfo& info : kt::formats()) {
    const Expert expert(info.format, 72, 40, 5);
    std::printf("%s %016llx\n", info.name, static_cast<unsigned long long>(fnv1a(expert.blob.get(), expert.bytes)));
  }
  for (const kt::IsaStatus& isa : kt::isa_status()) {
    if (isa.missing.empty()) check_table(isa.table->name);
  }
  check_refusals();
  check_callers();
  check_steps();
  std::printf("ok\n");
  return 0;
}
