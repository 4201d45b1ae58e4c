// Halves of a decoder layer, each in one call: norm, matrices, attention or mixture, residual. The same as the modules of
// kttools_runtime do operation by operation, without their overhead and in memory that is used again; rows are float32
// between matrices.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine.h"
#include "linear.h"
#include "moe.h"
#include "router.h"

namespace kt {

constexpr int kMaxStepRows = 4;      // more tokens are a prefill: rows of float32 may be rounded for the matrix unit
constexpr int kMaxGroupRows = 1024;  // a longer prefill goes through the attention and dense layers in groups

// fn(row) for all rows; those of a prefill by all workers.
template <typename F>
void each_row(Engine& engine, int rows, const F& fn) {
  constexpr int kRows = 8;
  if (rows <= kMaxStepRows) {
    for (int r = 0; r < rows; ++r) fn(static_cast<size_t>(r));
    return;
  }
  UnitCounter next;
  engine.pool().run(std::min(engine.threads(), (rows + kRows - 1) / kRows), [&](int) {
    for (int first = next.take() * kRows; first < rows; first = next.take() * kRows) {
      for (int r = first; r < std::min(first + kRows, rows); ++r) fn(static_cast<size_t>(r));
    }
  });
}

// x as the matrices of a step take it.
inline Input step_input(const float* x, int rows, int cols) { return {x, false, rows, cols, rows > kMaxStepRows}; }

// RMS norm as rms_norm (row_math.h) takes it: sqrt(n) weight and n eps.
class Norm {
 public:
  Norm(const float* scaled_weight, int size, float sum_eps)
      : scaled_(scaled_weight, scaled_weight + size), sum_eps_(sum_eps) {}
  int size() const { return static_cast<int>(scaled_.size()); }
  void apply(const float* x, float* out) const;

 private:
  std::vector<float> scaled_;
  float sum_eps_;
};

// One or two matrices on the same input, their outputs side by side.
class LinearPair {
 public:
  // second may be null. Throws std::invalid_argument when the inputs differ.
  LinearPair(PackedLinear* first, PackedLinear* second);
  int in_features() const { return first_->in_features(); }
  int first_features() const { return first_->out_features(); }
  int out_features() const { return first_->out_features() + (second_ ? second_->out_features() : 0); }
  // out [rows, out_features].
  void forward(const float* x, int rows, float* out) const;
  // out [rows, out_features / 2] = silu(first half of the outputs) * second half, in one pass. False where the matrices allow
  // none: nothing is done then.
  bool forward_gated(const float* x, int rows, float* out) const;

 private:
  PackedLinear* first_;
  PackedLinear* second_;
};

// down(silu(gate) * up).
class GatedMlp {
 public:
  GatedMlp(std::shared_ptr<Engine> engine, LinearPair gate_up, PackedLinear* down);
  int hidden_size() const { return down_->out_features(); }
  void forward(const float* x, int rows, const LinearOut& out) const;

 private:
  std::shared_ptr<Engine> engine_;
  LinearPair gate_up_;
  PackedLinear* down_;
};

// hidden += mlp(norm(hidden)).
class DenseStep {
 public:
  DenseStep(std::shared_ptr<Engine> engine, Norm norm, GatedMlp mlp);
  int hidden_size() const { return norm_.size(); }
  void forward(float* hidden, int rows);

 private:
  std::shared_ptr<Engine> engine_;
  Norm norm_;
  GatedMlp mlp_;
};

// hidden += experts(norm(hidden)) + shared(norm(hidden)).
class MoeStep {
 public:
  // shared may be null; shared_gate: [hidden_size], its output is multiplied by sigmoid(gate . x), or empty.
  MoeStep(std::shared_ptr<Engine> engine, Norm norm, Router* router, ExpertLayer* experts,
          std::unique_ptr<GatedMlp> shared, std::vector<float> shared_gate);
  int hidden_size() const { return norm_.size(); }
  // rule: what is kept of the router's choice, or null.
  void forward(float* hidden, int rows, const ExpertRule* rule = nullptr);
  const Router& router() const { return *router_; }
  // The first part of forward(): x [rows, hidden_size], the normed hidden, and its choice as Router::forward gives it.
  void route(const float* hidden, int rows, float* x, const TokenChoice& out, const ExpertRule* rule = nullptr);
  // The second: x and a choice of its rows, route()'s own or what somebody made of it.
  void forward_routed(float* hidden, const float* x, int rows, const Routing& routing);

 private:
  void choose(const float* hidden, int rows, float* x, const TokenChoice& out, const ExpertRule* rule);
  void mix(float* hidden, const float* x, int rows, const Routing& routing);
  void add_shared(const float* x, int rows, float* hidden) const;

  std::shared_ptr<Engine> engine_;
  Norm norm_;
  Router* router_;
  ExpertLayer* experts_;
  std::unique_ptr<GatedMlp> shared_;
  std::vector<float> shared_gate_;
};

}  // namespace kt
