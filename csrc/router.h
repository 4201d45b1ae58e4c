// A mixture's router: scores of all experts, group limit, the best k and their weights; what
// kttools_runtime/routing.py does with torch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine.h"
#include "expert_rule.h"

namespace kt {

enum class RouterKind { kSigmoidBiasGroups, kSoftmaxGroups };

struct RouterShape {
  RouterKind kind;
  int num_experts;
  int hidden_size;
  int groups;
  int top_groups;
  int k;
  bool normalise;
  float scale;
};

class Router {
 public:
  // weight [num_experts, hidden_size], read in place unless bf16 holds it exactly (then half the bytes are kept);
  // bias [num_experts], added to scores when they are compared, or empty; logit_bias [num_experts], added to weight * x, or
  // empty. Throws std::invalid_argument on a shape that cannot be.
  Router(std::shared_ptr<Engine> engine, const RouterShape& shape, const float* weight, std::vector<float> bias,
         std::vector<float> logit_bias = {});

  const RouterShape& shape() const { return shape_; }

  // Ids and weights of a row under a rule, which may be null.
  int width(const ExpertRule* rule) const { return rule ? rule->width() : shape_.k; }

  // x [rows, hidden_size] -> ids and weights [rows, width(rule)], best first. Equal choices: the lower id first. scores
  // [rows, k], what was compared, or null, as with a rule. Throws std::invalid_argument for another router's rule.
  void forward(const float* x, int rows, const TokenChoice& out, const ExpertRule* rule = nullptr);

 private:
  struct Scratch;

  void check_rule(const ExpertRule& rule) const;
  void choose_row(float* scores, size_t row, const TokenChoice& out, const ExpertRule* rule, Scratch& scratch) const;
  void logits(const float* x, int begin, int end, float* out) const;
  void choose(float* scores, const TokenChoice& out, Scratch& scratch) const;
  void limit_groups(Scratch& scratch) const;

  std::shared_ptr<Engine> engine_;
  RouterShape shape_;
  const float* weight_;
  std::vector<uint16_t> weight_bf16_;  // empty: not exact
  std::vector<float> bias_;
  std::vector<float> logit_bias_;
  std::vector<float> scores_;  // of all tokens
};

}  // namespace kt
