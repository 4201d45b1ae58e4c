// The attention half of a decoder layer: grouped-query attention (arXiv 2305.13245) of a few tokens, in one call. The same as
// kttools_runtime/gqa.py does operation by operation; many tokens go through torch's flash kernel.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "gqa_part.h"
#include "step.h"

namespace kt {

struct GqaShape {
  int heads;
  int kv_heads;  // divides heads
  int dim;       // of a head
  int rope;      // leading part of a head that is rotated, even
  int window;    // positions that a query sees, its own included; 0: all before it

  int group() const { return heads / kv_heads; }
  int queries() const { return heads * dim; }
  int keys() const { return kv_heads * dim; }
  int projected() const { return queries() + 2 * keys(); }
  int cached() const { return 2 * keys(); }  // a row of the cache: all keys, then all values
};

// What some families have and others lack; empty where they do.
struct GqaExtras {
  std::vector<float> input_bias;  // [projected()]: of q, k and v
  std::optional<Norm> q_norm;     // [dim], of every head, before the rotation
  std::optional<Norm> k_norm;
  std::vector<float> sinks;     // [heads]: one more logit of the softmax, which has no value
  std::vector<float> out_bias;  // [hidden_size]
};

class GqaStep {
 public:
  // inputs: one matrix of [queries | keys | values], or these three. Throws std::invalid_argument when sizes do not fit.
  GqaStep(std::shared_ptr<Engine> engine, const GqaShape& shape, float softmax_scale, Norm norm,
          std::vector<PackedLinear*> inputs, PackedLinear* out, GqaExtras extras);

  const GqaShape& shape() const { return shape_; }
  int hidden_size() const { return norm_.size(); }

  // hidden [rows, hidden_size] += attention(norm(hidden)) for at most kMaxStepRows tokens at positions start...; rotations
  // [rows, rope] as (cosine, sine) pairs; cache [>= start + rows, cached()] bf16, rows start... are written. The same bits
  // for any number of threads.
  void forward(float* hidden, int rows, const float* rotations, uint16_t* cache, int start);

 private:
  struct Columns {
    float* data;
    size_t stride;
    float* row(size_t r) const { return data + r * stride; }
  };
  struct Projected {
    Columns query, key, value;
  };
  struct Plan;

  Projected project(const float* x, int rows);
  void position(const Projected& projected, int row, const float* rotation, uint16_t* cached) const;
  void turn_heads(float* data, int heads, const std::optional<Norm>& norm, const float* rotation) const;
  void attend(const Columns& query, int rows, const uint16_t* cache, int start, float* out);
  void attend_unit(const Plan& plan, int unit, uint8_t* scratch) const;
  size_t part_scratch() const;
  void attend_part(const float* queries, int count, const KeyRows& rows, uint8_t* scratch, float* out,
                   PartialSoftmax* sums) const;
  void join_head(const Plan& plan, int row, int head, float* out) const;

  std::shared_ptr<Engine> engine_;
  GqaShape shape_;
  float softmax_scale_;
  bool has_tiles_;
  Norm norm_;
  std::vector<PackedLinear*> inputs_;
  PackedLinear* out_;
  GqaExtras extras_;
};

}  // namespace kt
