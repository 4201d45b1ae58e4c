// The attention half of a decoder layer: multi-head latent attention (arXiv 2405.04434, 2.1). A few tokens are absorbed: the
// query is taken into the latent space and attends the compressed cache as it lies. Many go through full heads
// (latent_prefill.h).
#pragma once

#include <cstdint>
#include <memory>

#include "latent_head.h"
#include "latent_prefill.h"
#include "step.h"

namespace kt {

class LatentStep {
 public:
  // inputs: [queries | compressed], or with q_b [compressed query | compressed]. q_norm and q_b come together or not at all.
  // Throws std::invalid_argument when sizes do not fit.
  LatentStep(std::shared_ptr<Engine> engine, const LatentShape& shape, float softmax_scale,
             const LatentWeights& weights, Norm norm, LinearPair inputs, std::unique_ptr<Norm> q_norm,
             PackedLinear* q_b, Norm kv_norm, PackedLinear* out);

  const LatentShape& shape() const { return shape_; }
  int hidden_size() const { return norm_.size(); }
  // Whether more than kMaxStepRows tokens may come at once.
  bool takes_many() const { return latent_prefill_supports(*engine_, shape_); }

  // hidden [rows, hidden_size] += attention(norm(hidden)) for tokens at positions start...; rotations [rows, rope] as
  // (cosine, sine) pairs; cache [>= start + rows, cached()] bf16, rows start... are written.
  void forward(float* hidden, int rows, const float* rotations, uint16_t* cache, int start);

 private:
  void forward_group(float* hidden, int rows, const float* rotations, uint16_t* cache, int start);
  float* queries(const float* projected, int rows) const;
  void append(float* compressed, const float* rotation, uint16_t* row) const;
  void attend(const float* query, const uint16_t* cache, int keys, float* out);
  void attend_heads(const float* query, const uint16_t* cache, int keys, int begin, int end, Buffer& scratch,
                    float* out) const;

  std::shared_ptr<Engine> engine_;
  LatentShape shape_;
  float softmax_scale_;
  LatentWeights weights_;
  Norm norm_;
  LinearPair inputs_;
  std::unique_ptr<Norm> q_norm_;
  PackedLinear* q_b_;
  Norm kv_norm_;
  PackedLinear* out_;
};

}  // namespace kt
