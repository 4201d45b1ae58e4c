#include "latent_prefill.h"

#include <algorithm>
#include <cstring>

namespace kt {
namespace {

constexpr int kPairTokens = 2 * kTileRows;

}  // namespace

#if defined(__x86_64__)

bool latent_prefill_supports(const Engine& engine, const LatentShape& shape) {
  const auto whole = [](int size) { return size > 0 && size % 32 == 0; };
  return engine.kernels().tile_bf16 != nullptr && whole(shape.nope) && whole(shape.rope) && whole(shape.value) &&
         whole(shape.latent);
}

void latent_prefill(Engine& engine, const LatentShape& shape, const LatentWeights& weights, float softmax_scale,
                    const LatentQueries& queries, const uint16_t* cache, float* out) {
  const auto cached = static_cast<size_t>(shape.cached()), latent = static_cast<size_t>(shape.latent);
  const auto value = static_cast<size_t>(shape.value), nope = static_cast<size_t>(shape.nope);
  const int tokens = queries.start + queries.rows, pairs = (tokens + kPairTokens - 1) / kPairTokens;
  const size_t tile_row = cached / 32 * kTileBytes;  // the tiles of 16 tokens
  const size_t tiles_bytes = static_cast<size_t>(pairs) * 2 * tile_row;
  StepScratch& step = engine.step;
  step.context.reserve(tiles_bytes + kPairTokens * cached * sizeof(uint16_t));
  uint8_t* tiles = step.context.bytes();
  auto* last_rows = reinterpret_cast<uint16_t*>(tiles + tiles_bytes);
  const size_t last = static_cast<size_t>(pairs - 1) * kPairTokens, rest = static_cast<size_t>(tokens) - last;
  std::memcpy(last_rows, cache + last * cached, rest * cached * sizeof(uint16_t));
  std::memset(last_rows + rest * cached, 0, (kPairTokens - rest) * cached * sizeof(uint16_t));
  const int workers = std::min(engine.threads(), shape.heads);
  for (int w = 0; w < workers; ++w) {
    step.workers[static_cast<size_t>(w)].reserve(latent_head_scratch(shape, queries.rows));
  }
  UnitCounter next_tiles, next_head;
  Barrier barrier(workers);
  engine.pool().run(workers, [&](int worker) {
    for (int unit = next_tiles.take(); unit < 2 * pairs; unit = next_tiles.take()) {
      const int token = unit * kTileRows, count = std::clamp(tokens - token, 0, kTileRows);
      const uint16_t* from = cache + static_cast<size_t>(count ? token : 0) * cached;
      latent_tiles_amx(from, count, cached, tiles + static_cast<size_t>(unit) * tile_row);
    }
    barrier.wait();
    engine.kernels().tile_configure(kTileRows);
    for (int unit = next_head.take(); unit < shape.heads; unit = next_head.take()) {
      const auto head = static_cast<size_t>(unit);
      LatentHead one = {};
      one.shape = shape;
      one.query = queries.data + head * static_cast<size_t>(shape.key());
      one.query_stride = queries.stride;
      one.rotation = queries.rotations;
      one.queries = queries.rows;
      one.start = queries.start;
      one.context = cache;
      one.context_end = last_rows;
      one.context_tiles = tiles;
      one.up_key = weights.up_key + head * nope * latent;
      one.up_value = weights.up_value + head * value * latent;
      one.scale = softmax_scale;
      one.out = out + head * value;
      one.out_stride = static_cast<size_t>(shape.heads) * value;
      one.scratch = step.workers[static_cast<size_t>(worker)].bytes();
      latent_head_amx(one);
    }
    engine.kernels().tile_release();
  });
}

#else

bool latent_prefill_supports(const Engine&, const LatentShape&) { return false; }

void latent_prefill(Engine&, const LatentShape&, const LatentWeights&, float, const LatentQueries&, const uint16_t*,
                    float*) {}

#endif

}  // namespace kt
