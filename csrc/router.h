// A mixture's router: scores of all experts, group limit, the best k and their weights; what
// kttools_runtime/routing.py does with torch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine.h"

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

  // x [rows, hidden_size] -> ids and weights [rows, k], best first. Equal choices: the lower id first. scores [rows, k],
  // what was compared, or null.
  void forward(const float* x, int rows, int64_t* ids, float* weights, float* scores = nullptr);

 private:
  void logits(const float* x, int begin, int end, float* out) const;
  void choose(float* scores, int64_t* ids, float* weights, float* chosen) const;
  void limit_groups(std::vector<float>& choice) const;

  std::shared_ptr<Engine> engine_;
  RouterShape shape_;
  const float* weight_;
  std::vector<uint16_t> weight_bf16_;  // empty: not exact
  std::vector<float> bias_;
  std::vector<float> logit_bias_;
  std::vector<float> scores_;  // of all tokens
};

}  // namespace kt
