// Multi-head latent attention of many tokens: keys and values of a block of the context are made from the latents, head by
// head, attended to and forgotten. Needs a matrix unit; where there is none, the caller has torch do it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.h"
#include "latent_head.h"

namespace kt {

struct LatentQueries {
  const float* data;  // [rows][heads * key()], not rotated, rows `stride` floats apart
  size_t stride;
  int rows;
  int start;               // position of row 0
  const float* rotations;  // [rows][rope]
};

// Whether the engine's kernels take these sizes.
bool latent_prefill_supports(const Engine& engine, const LatentShape& shape);

// cache: bf16 [queries.start + queries.rows][cached()] -> out [rows][heads * value]. The same bits for any number of threads.
// Uses engine.step.context and .workers; rows at most kLatentQueries.
void latent_prefill(Engine& engine, const LatentShape& shape, const LatentWeights& weights, float softmax_scale,
                    const LatentQueries& queries, const uint16_t* cache, float* out);

}  // namespace kt
