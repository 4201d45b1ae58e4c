// Multi-head latent attention of many tokens: keys and values of a block of the context are made from the latents, head by
// head, attended to and forgotten. Needs a matrix unit; where there is none, the caller has torch do it.
#pragma once

#include <cstdint>
#include <memory>

#include "engine.h"
#include "latent_head.h"

namespace kt {

class LatentPrefill {
 public:
  // Whether the engine's kernels take these sizes.
  static bool supports(const Engine& engine, const LatentShape& shape);

  // The weights are read in place. Throws std::invalid_argument where supports() is false.
  LatentPrefill(std::shared_ptr<Engine> engine, const LatentShape& shape, float softmax_scale,
                const LatentWeights& weights);
  const LatentShape& shape() const { return shape_; }

  // query [rows][heads * key()], not rotated, of positions start...; rotations [rows][rope]; cache bf16 [.][cached()] of which
  // start + rows rows are read -> out [rows][heads * value]. The same for any number of threads.
  void forward(const float* query, int rows, const float* rotations, const uint16_t* cache, int start, float* out);

 private:
  std::shared_ptr<Engine> engine_;
  LatentShape shape_;
  float softmax_scale_;
  LatentWeights weights_;
};

}  // namespace kt
