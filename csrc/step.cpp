#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "row_math.h"

namespace kt {
namespace {

float* reserve_floats(Buffer& buffer, int rows, int cols) {
  buffer.reserve(static_cast<size_t>(rows) * static_cast<size_t>(cols) * sizeof(float));
  return buffer.as<float>();
}

void forward_linear(PackedLinear& linear, const float* x, int rows, const LinearOut& out) {
  linear.forward(step_input(x, rows, linear.in_features()), out);
}

void check_size(int got, int expected, const char* what) {
  if (got != expected) {
    throw std::invalid_argument(std::string(what) + ": expected " + std::to_string(expected) + " features, got " +
                                std::to_string(got));
  }
}

}  // namespace

void Norm::apply(const float* x, float* out) const { rms_norm(x, scaled_.data(), scaled_.size(), sum_eps_, out); }

LinearPair::LinearPair(PackedLinear* first, PackedLinear* second) : first_(first), second_(second) {
  if (second) check_size(second->in_features(), first->in_features(), "second matrix");
}

void LinearPair::forward(const float* x, int rows, float* out) const {
  const auto width = static_cast<size_t>(out_features());
  forward_linear(*first_, x, rows, {out, width});
  if (second_) forward_linear(*second_, x, rows, {out + first_->out_features(), width});
}

bool LinearPair::forward_gated(const float* x, int rows, float* out) const {
  if (!PackedLinear::can_gate(*first_, second_)) return false;
  PackedLinear::forward_gated(*first_, second_, step_input(x, rows, in_features()), out);
  return true;
}

GatedMlp::GatedMlp(std::shared_ptr<Engine> engine, LinearPair gate_up, PackedLinear* down)
    : engine_(std::move(engine)), gate_up_(gate_up), down_(down) {
  check_size(gate_up.out_features(), 2 * down->in_features(), "gate and up");
  check_size(gate_up.in_features(), down->out_features(), "gate and up's input");
}

void GatedMlp::forward(const float* x, int rows, const LinearOut& out) const {
  const int inner_size = down_->in_features();
  float* inner = reserve_floats(engine_->step.inner, rows, inner_size);
  if (!gate_up_.forward_gated(x, rows, inner)) {
    const auto width = static_cast<size_t>(inner_size);
    float* both = reserve_floats(engine_->step.projected, rows, 2 * inner_size);
    gate_up_.forward(x, rows, both);
    each_row(*engine_, rows,
             [&](size_t r) { silu_mul(both + r * 2 * width, both + r * 2 * width + width, width, inner + r * width); });
  }
  forward_linear(*down_, inner, rows, out);
}

DenseStep::DenseStep(std::shared_ptr<Engine> engine, Norm norm, GatedMlp mlp)
    : engine_(std::move(engine)), norm_(std::move(norm)), mlp_(std::move(mlp)) {
  check_size(mlp_.hidden_size(), norm_.size(), "mlp");
}

void DenseStep::forward(float* hidden, int rows) {
  std::lock_guard<std::mutex> stepping(engine_->stepping());
  const auto width = static_cast<size_t>(hidden_size());
  for (int first = 0; first < rows; first += kMaxGroupRows) {
    const int count = std::min(kMaxGroupRows, rows - first);
    float* group = hidden + static_cast<size_t>(first) * width;
    float* x = reserve_floats(engine_->step.normed, count, hidden_size());
    each_row(*engine_, count, [&](size_t r) { norm_.apply(group + r * width, x + r * width); });
    mlp_.forward(x, count, {group, width, false, true});
  }
}

MoeStep::MoeStep(std::shared_ptr<Engine> engine, Norm norm, Router* router, ExpertLayer* experts,
                 std::unique_ptr<GatedMlp> shared, std::vector<float> shared_gate)
    : engine_(std::move(engine)),
      norm_(std::move(norm)),
      router_(router),
      experts_(experts),
      shared_(std::move(shared)),
      shared_gate_(std::move(shared_gate)) {
  check_size(router->shape().hidden_size, norm_.size(), "router");
  check_size(experts->hidden_size(), norm_.size(), "experts");
  check_size(experts->num_experts(), router->shape().num_experts, "experts in the router");
  if (shared_) check_size(shared_->hidden_size(), norm_.size(), "shared expert");
  if (!shared_gate_.empty()) check_size(static_cast<int>(shared_gate_.size()), norm_.size(), "shared expert's gate");
}

void MoeStep::forward(float* hidden, int rows, const ExpertRule* rule) {
  std::lock_guard<std::mutex> stepping(engine_->stepping());
  float* x = reserve_floats(engine_->step.normed, rows, hidden_size());
  const int k = router_->width(rule);
  std::vector<int64_t> ids(static_cast<size_t>(rows) * static_cast<size_t>(k));
  std::vector<float> weights(ids.size());
  choose(hidden, rows, x, {ids.data(), weights.data(), nullptr}, rule);
  mix(hidden, x, rows, {ids.data(), weights.data(), k});
}

void MoeStep::route(const float* hidden, int rows, float* x, const TokenChoice& out, const ExpertRule* rule) {
  std::lock_guard<std::mutex> stepping(engine_->stepping());
  choose(hidden, rows, x, out, rule);
}

void MoeStep::choose(const float* hidden, int rows, float* x, const TokenChoice& out, const ExpertRule* rule) {
  const auto width = static_cast<size_t>(hidden_size());
  each_row(*engine_, rows, [&](size_t r) { norm_.apply(hidden + r * width, x + r * width); });
  router_->forward(x, rows, out, rule);
}

void MoeStep::forward_routed(float* hidden, const float* x, int rows, const Routing& routing) {
  std::lock_guard<std::mutex> stepping(engine_->stepping());
  mix(hidden, x, rows, routing);
}

void MoeStep::mix(float* hidden, const float* x, int rows, const Routing& routing) {
  const auto width = static_cast<size_t>(hidden_size());
  float* routed = reserve_floats(engine_->step.routed, rows, hidden_size());
  experts_->forward(step_input(x, rows, hidden_size()), routing, routed);
  for (int first = 0; shared_ && first < rows; first += kMaxGroupRows) {
    const size_t offset = static_cast<size_t>(first) * width;
    add_shared(x + offset, std::min(kMaxGroupRows, rows - first), routed + offset);
  }
  each_row(*engine_, rows, [&](size_t r) { add_scaled(hidden + r * width, routed + r * width, 1.0f, width); });
}

void MoeStep::add_shared(const float* x, int rows, float* routed) const {
  const auto width = static_cast<size_t>(hidden_size());
  if (shared_gate_.empty()) return shared_->forward(x, rows, {routed, width, false, true});
  float* out = reserve_floats(engine_->step.out, rows, hidden_size());
  shared_->forward(x, rows, {out, width});
  each_row(*engine_, rows, [&](size_t r) {
    float scale;
    dot_rows_f32(x + r * width, shared_gate_.data(), 1, width, &scale);
    scale = 1.0f / (1.0f + std::exp(-scale));
    add_scaled(routed + r * width, out + r * width, scale, width);
  });
}

}  // namespace kt
