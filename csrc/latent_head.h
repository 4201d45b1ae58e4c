// Multi-head latent attention: its sizes, and the contract between prefill and an instruction set. Like kernels.h, nothing
// here allocates, throws or starts a thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

struct LatentShape {
  int heads;
  int nope;    // qk_nope_head_dim
  int rope;    // qk_rope_head_dim
  int value;   // v_head_dim
  int latent;  // kv_lora_rank

  int key() const { return nope + rope; }
  int cached() const { return latent + rope; }
};

// W_UK [heads, nope, latent] and W_UV [heads, value, latent] in bf16, owned by the caller.
struct LatentWeights {
  const uint16_t* up_key;
  const uint16_t* up_value;
};

// One head of one group of queries.
struct LatentHead {
  LatentShape shape;
  const float* query;  // [queries][key()], rows query_stride floats apart; not yet rotated
  size_t query_stride;
  const float* rotation;  // [queries][rope]: cosine and sine of each pair
  int queries;
  int start;                     // position of query 0; a query sees the context up to itself
  const uint16_t* context;       // bf16 [start + queries][cached()]
  const uint16_t* context_end;   // its last 32 rows begun, [32][cached()], zero beyond the end
  const uint8_t* context_tiles;  // the context as B tiles: [token / 16][cached() / 32][pair][token % 16][2]
  const uint16_t* up_key;        // this head's [nope][latent]
  const uint16_t* up_value;      // and [value][latent]
  float scale;
  float* out;  // [queries][value], rows out_stride floats apart
  size_t out_stride;
  uint8_t* scratch;  // latent_head_scratch() bytes, 64-byte aligned
};

#if defined(__x86_64__)
size_t latent_head_scratch(const LatentShape& shape, int queries);
// Both of these want tiles configured for 16 rows on this thread.
void latent_head_amx(const LatentHead& head);
// `rows` rows of bf16, `width` (a multiple of 32) each -> width / 32 B tiles of 1 KiB; rows from `rows` to 16 count as 0.
void latent_tiles_amx(const uint16_t* from, int rows, size_t width, uint8_t* tiles);
#endif

}  // namespace kt
