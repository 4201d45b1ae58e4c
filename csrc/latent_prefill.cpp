#include "latent_prefill.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace kt {
namespace {

constexpr int kPairTokens = 2 * kTileRows;

}  // namespace

bool LatentPrefill::supports(const Engine& engine, const LatentShape& shape) {
#if defined(__x86_64__)
  const bool whole = shape.nope % 32 == 0 && shape.rope % 32 == 0 && shape.value % 32 == 0 && shape.latent % 32 == 0;
  return engine.kernels().tile_bf16 != nullptr && whole && shape.heads > 0 && shape.nope > 0;
#else
  (void)engine, (void)shape;
  return false;
#endif
}

LatentPrefill::LatentPrefill(std::shared_ptr<Engine> engine, const LatentShape& shape, float softmax_scale,
                             const LatentWeights& weights)
    : engine_(std::move(engine)), shape_(shape), softmax_scale_(softmax_scale), weights_(weights) {
  if (!supports(*engine_, shape)) throw std::invalid_argument("latent prefill: no kernel here for these sizes");
}

#if defined(__x86_64__)

void LatentPrefill::forward(const float* query, int rows, const float* rotations, const uint16_t* cache, int start,
                            float* out) {
  std::lock_guard<std::mutex> stepping(engine_->stepping());
  const auto cached = static_cast<size_t>(shape_.cached()), latent = static_cast<size_t>(shape_.latent);
  const auto heads = static_cast<size_t>(shape_.heads), key = static_cast<size_t>(shape_.key());
  const auto value = static_cast<size_t>(shape_.value), nope = static_cast<size_t>(shape_.nope);
  const int tokens = start + rows, pairs = (tokens + kPairTokens - 1) / kPairTokens;
  const size_t pair_bytes = 2 * cached / 32 * kTileBytes;
  StepScratch& step = engine_->step;
  step.context.reserve(static_cast<size_t>(pairs) * pair_bytes + kPairTokens * cached * sizeof(uint16_t));
  uint8_t* tiles = step.context.bytes();
  auto* last_rows = reinterpret_cast<uint16_t*>(tiles + static_cast<size_t>(pairs) * pair_bytes);
  const size_t last = static_cast<size_t>(pairs - 1) * kPairTokens, rest = static_cast<size_t>(tokens) - last;
  std::memcpy(last_rows, cache + last * cached, rest * cached * sizeof(uint16_t));
  std::memset(last_rows + rest * cached, 0, (kPairTokens - rest) * cached * sizeof(uint16_t));
  const int workers = engine_->threads();
  for (int w = 0; w < workers; ++w) {
    step.workers[static_cast<size_t>(w)].reserve(latent_head_scratch(shape_, std::min(rows, kLatentQueries)));
  }
  const int groups = (rows + kLatentQueries - 1) / kLatentQueries;
  UnitCounter next_pair, next_head;
  Barrier barrier(workers);
  engine_->pool().run(workers, [&](int worker) {
    const KernelTable& kernels = engine_->kernels();
    for (int pair = next_pair.take(); pair < pairs; pair = next_pair.take()) {
      for (int half = 0; half < 2; ++half) {
        const int token = pair * kPairTokens + half * kTileRows;
        const int count = std::max(0, std::min(kTileRows, tokens - token));
        const uint16_t* from = cache + static_cast<size_t>(std::min(token, tokens - 1)) * cached;
        latent_tiles_amx(from, count, cached, tiles + static_cast<size_t>(pair) * pair_bytes + half * pair_bytes / 2);
      }
    }
    barrier.wait();
    kernels.tile_configure(kTileRows);
    for (int unit = next_head.take(); unit < groups * shape_.heads; unit = next_head.take()) {
      const auto head = static_cast<size_t>(unit % shape_.heads);
      const auto first = static_cast<size_t>(unit / shape_.heads) * kLatentQueries;
      LatentHead one = {};
      one.shape = shape_;
      one.query = query + first * heads * key + head * key;
      one.query_stride = heads * key;
      one.rotation = rotations + first * static_cast<size_t>(shape_.rope);
      one.queries = std::min(kLatentQueries, rows - static_cast<int>(first));
      one.start = start + static_cast<int>(first);
      one.context_rows = tokens;
      one.context = cache;
      one.context_end = last_rows;
      one.context_tiles = tiles;
      one.up_key = weights_.up_key + head * nope * latent;
      one.up_value = weights_.up_value + head * value * latent;
      one.scale = softmax_scale_;
      one.out = out + first * heads * value + head * value;
      one.out_stride = heads * value;
      one.scratch = step.workers[static_cast<size_t>(worker)].bytes();
      latent_head_amx(one);
    }
    kernels.tile_release();
  });
}

#else

void LatentPrefill::forward(const float*, int, const float*, const uint16_t*, int, float*) {}

#endif

}  // namespace kt
