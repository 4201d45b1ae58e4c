// Attention of one head over latents, with AMX bf16: see LatentHead. Like a flash kernel (arXiv 2205.14135) it goes through
// the context in blocks with a running maximum; unlike one, it makes the block's keys and values itself.
#include <immintrin.h>

#include <math.h>
#include <string.h>

#include "amx_vectors.h"
#include "kernels.h"
#include "latent_head.h"

namespace kt {
namespace {

constexpr int kPair = 2 * kTileRows;  // rows of two tiles
constexpr int kBlock = 256;           // tokens whose keys and values are held
constexpr int kBlockPairs = kBlock / kPair;
constexpr int kRowsAhead = 8;  // rows of a head lie pages apart: no hardware prefetch finds them
constexpr float kNone = -__builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f;

inline int least(int a, int b) { return a < b ? a : b; }

// Where things lie in LatentHead::scratch.
struct Plan {
  int key_steps, latent_steps, nope_steps, value_pairs, query_pairs;
  size_t queries, keys, values, up_value, scores, chances, sums, product, maximum, total, bytes;

  Plan(const LatentShape& shape, int rows)
      : key_steps(shape.key() / 32),
        latent_steps(shape.latent / 32),
        nope_steps(shape.nope / 32),
        value_pairs(shape.value / kPair),
        query_pairs((rows + kPair - 1) / kPair) {
    size_t at = 0;
    const auto take = [&at](size_t wanted) {
      const size_t begin = at;
      at += (wanted + 63) / 64 * 64;
      return begin;
    };
    const auto padded = static_cast<size_t>(query_pairs) * kPair;
    queries = take(padded * static_cast<size_t>(shape.key()) * 2);
    keys = take(static_cast<size_t>(kBlock) * static_cast<size_t>(shape.nope) * 2);
    values = take(static_cast<size_t>(kBlock) * static_cast<size_t>(shape.value) * 2);
    up_value = take(static_cast<size_t>(shape.value) * static_cast<size_t>(shape.latent) * 2);
    scores = take(static_cast<size_t>(kPair) * kBlock * 4);
    chances = take(static_cast<size_t>(kPair) * kBlock * 2);
    sums = take(padded * static_cast<size_t>(shape.value) * 4);
    product = take(static_cast<size_t>(kPair) * kPair * 4);
    maximum = take(padded * 4);
    total = take(padded * 4);
    bytes = at;
  }
};

// Two A tiles against two B tiles, `steps` k-steps; tiles 0-3 take the four products.
struct Operands {
  const uint8_t* a;  // rows a_stride bytes apart; the second tile 16 rows on
  size_t a_stride;
  const uint8_t* b0;  // 1 KiB a k-step
  const uint8_t* b1;
};

inline void multiply(const Operands& x, int steps) {
  const uint8_t* lower = x.a + kTileRows * x.a_stride;
  for (int step = 0; step < steps; ++step) {
    _tile_loadd(6, x.b0 + step * kTileBytes, 64);
    _tile_loadd(4, x.a + step * 64, x.a_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, x.b1 + step * kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower + step * 64, x.a_stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

inline void zero() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void load(const float* c, size_t stride) {
  _tile_loadd(0, c, stride * 4);
  _tile_loadd(1, c + 16, stride * 4);
  _tile_loadd(2, c + kTileRows * stride, stride * 4);
  _tile_loadd(3, c + kTileRows * stride + 16, stride * 4);
}

inline void store(float* c, size_t stride) {
  _tile_stored(0, c, stride * 4);
  _tile_stored(1, c + 16, stride * 4);
  _tile_stored(2, c + kTileRows * stride, stride * 4);
  _tile_stored(3, c + kTileRows * stride + 16, stride * 4);
}

// A product [32][32] as two B tiles whose k is its rows: columns 0-15 to `left`, 16-31 to `right`.
inline void to_tiles(const float* product, uint8_t* left, uint8_t* right) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int pair = 0; pair < kTileRows; ++pair) {
    const float* even = product + 2 * pair * kPair;
    const float* odd = even + kPair;
    const auto first = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(odd), _mm512_loadu_ps(even));
    const auto second = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(odd + 16), _mm512_loadu_ps(even + 16));
    _mm512_storeu_si512(left + pair * 64, _mm512_permutexvar_epi16(interleave, first));
    _mm512_storeu_si512(right + pair * 64, _mm512_permutexvar_epi16(interleave, second));
  }
}

class Head {
 public:
  explicit Head(const LatentHead& head) : head_(head), shape_(head.shape), plan_(head.shape, head.queries) {}

  void run() {
    take_queries();
    for (int pair = 0; pair < 2 * plan_.value_pairs; ++pair) {
      latent_tiles_amx(head_.up_value + static_cast<size_t>(pair) * kTileRows * latent(), kTileRows, latent(),
                       at(plan_.up_value) + static_cast<size_t>(pair) * plan_.latent_steps * kTileBytes);
    }
    const int tokens = head_.start + head_.queries;
    for (int first = 0; first < tokens; first += kBlock) {
      const int pairs = least(kBlockPairs, (tokens - first + kPair - 1) / kPair);
      for (int pair = 0; pair < pairs; ++pair) expand(first, pair);
      for (int pair = 0; pair < plan_.query_pairs; ++pair) attend(first, pairs, pair);
    }
    finish();
  }

 private:
  uint8_t* at(size_t offset) const { return head_.scratch + offset; }
  float* floats(size_t offset) const { return reinterpret_cast<float*>(at(offset)); }
  size_t latent() const { return static_cast<size_t>(shape_.latent); }
  size_t value() const { return static_cast<size_t>(shape_.value); }
  size_t cached() const { return static_cast<size_t>(shape_.cached()); }
  const uint8_t* context_tile(int token) const {
    return head_.context_tiles + static_cast<size_t>(token / kTileRows) * (cached() / 32) * kTileBytes;
  }

  // Rotated, scaled so that the softmax is one of powers of two, rounded to bf16, padded with rows of zeros.
  void take_queries() const {
    const auto key = static_cast<size_t>(shape_.key()), nope = static_cast<size_t>(shape_.nope);
    const __m512 scale = _mm512_set1_ps(head_.scale * kLog2e);
    auto* out = reinterpret_cast<uint16_t*>(at(plan_.queries));
    for (int row = 0; row < head_.queries; ++row, out += key) {
      const float* query = head_.query + static_cast<size_t>(row) * head_.query_stride;
      const auto* later = reinterpret_cast<const char*>(query + kRowsAhead * head_.query_stride);
      for (size_t i = 0; row + kRowsAhead < head_.queries && i < key * 4; i += 64) _mm_prefetch(later + i, _MM_HINT_T0);
      const float* rotation = head_.rotation + static_cast<size_t>(row) * static_cast<size_t>(shape_.rope);
      for (size_t i = 0; i < key; i += 16) {
        __m512 x = _mm512_loadu_ps(query + i);
        if (i >= nope) {
          const __m512 turn = _mm512_loadu_ps(rotation + i - nope);
          const __m512 swapped = _mm512_permute_ps(x, 0xb1);
          x = _mm512_fmaddsub_ps(x, _mm512_moveldup_ps(turn), _mm512_mul_ps(swapped, _mm512_movehdup_ps(turn)));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(x, scale)));
      }
    }
    const size_t padding = static_cast<size_t>(plan_.query_pairs * kPair - head_.queries);
    memset(out, 0, padding * key * 2);
    for (int row = 0; row < plan_.query_pairs * kPair; ++row) {
      floats(plan_.maximum)[row] = kNone;
      floats(plan_.total)[row] = 0.0f;
    }
  }

  // Keys (but their rotary part, which is the context's own) and values of 32 tokens.
  void expand(int first, int pair) const {
    const int token = first + pair * kPair;
    const size_t row_bytes = latent() * 2;
    const uint8_t* tiles = context_tile(token);
    const uint8_t* next = context_tile(token + kTileRows);
    float* product = floats(plan_.product);
    const size_t tile_row = static_cast<size_t>(plan_.nope_steps) * kTileBytes;
    uint8_t* keys = at(plan_.keys) + static_cast<size_t>(pair) * 2 * tile_row;
    for (int step = 0; step < plan_.nope_steps; ++step) {
      zero();
      const auto* weights =
          reinterpret_cast<const uint8_t*>(head_.up_key) + static_cast<size_t>(step) * kPair * row_bytes;
      multiply({weights, row_bytes, tiles, next}, plan_.latent_steps);
      store(product, kPair);
      to_tiles(product, keys + step * kTileBytes, keys + tile_row + step * kTileBytes);
    }
    const bool whole = token + kPair <= head_.start + head_.queries;
    const uint16_t* rows = whole ? head_.context + static_cast<size_t>(token) * cached() : head_.context_end;
    uint8_t* values = at(plan_.values) + static_cast<size_t>(pair) * kPair * value() * 2;
    for (int columns = 0; columns < plan_.value_pairs; ++columns) {
      const uint8_t* weights = at(plan_.up_value) + static_cast<size_t>(columns) * 2 * plan_.latent_steps * kTileBytes;
      zero();
      multiply(
          {reinterpret_cast<const uint8_t*>(rows), cached() * 2, weights, weights + plan_.latent_steps * kTileBytes},
          plan_.latent_steps);
      store(product, kPair);
      to_tiles(product, values + columns * 2 * kTileBytes, values + (columns * 2 + 1) * kTileBytes);
    }
  }

  // 32 queries against the `pairs` pairs of token tiles of the block that begins at token `first`.
  void attend(int first, int pairs, int query_pair) const {
    const int position = head_.start + query_pair * kPair;
    if (position + kPair <= first) return;
    const int seen = least(pairs, (position + kPair - first + kPair - 1) / kPair);
    score(first, seen, query_pair);
    float* sums = floats(plan_.sums) + static_cast<size_t>(query_pair) * kPair * value();
    for (int row = 0; row < kPair; ++row) {
      const int limit = least(seen * kPair, position + row + 1 - first);
      weigh(row, query_pair * kPair + row, limit, seen * kPair, first > 0 ? sums + row * value() : nullptr);
    }
    const uint8_t* values = at(plan_.values);
    const size_t tile_row = static_cast<size_t>(plan_.value_pairs) * 2 * kTileBytes;
    for (int columns = 0; columns < plan_.value_pairs; ++columns) {
      float* c = sums + columns * kPair;
      first > 0 ? load(c, value()) : zero();
      const uint8_t* chances = at(plan_.chances);
      for (int step = 0; step < seen; ++step) {
        const uint8_t* b = values + step * tile_row + static_cast<size_t>(columns) * 2 * kTileBytes;
        multiply({chances + step * 64, kBlock * 2, b, b + kTileBytes}, 1);
      }
      store(c, value());
    }
  }

  void score(int first, int seen, int query_pair) const {
    const size_t row_bytes = static_cast<size_t>(shape_.key()) * 2;
    const uint8_t* queries = at(plan_.queries) + static_cast<size_t>(query_pair) * kPair * row_bytes;
    const size_t tile_row = static_cast<size_t>(plan_.nope_steps) * kTileBytes;
    for (int pair = 0; pair < seen; ++pair) {
      const uint8_t* keys = at(plan_.keys) + static_cast<size_t>(pair) * 2 * tile_row;
      const uint8_t* rotary = context_tile(first + pair * kPair) + plan_.latent_steps * kTileBytes;
      const uint8_t* next = context_tile(first + pair * kPair + kTileRows) + plan_.latent_steps * kTileBytes;
      zero();
      multiply({queries, row_bytes, keys, keys + tile_row}, plan_.nope_steps);
      multiply({queries + plan_.nope_steps * 64, row_bytes, rotary, next}, plan_.key_steps - plan_.nope_steps);
      store(floats(plan_.scores) + pair * kPair, kBlock);
    }
  }

  // Scores of one query to bf16 powers of two under a running maximum: `limit` of them, zeros up to `width`. What was summed
  // before (null: nothing) is rescaled when the maximum grows.
  void weigh(int row, int query, int limit, int width, float* before) const {
    const float* scores = floats(plan_.scores) + static_cast<size_t>(row) * kBlock;
    auto* chances = reinterpret_cast<uint16_t*>(at(plan_.chances)) + static_cast<size_t>(row) * kBlock;
    if (limit <= 0) {
      memset(chances, 0, static_cast<size_t>(width) * 2);
      return;
    }
    const int full = limit / 16 * 16;
    const auto rest = static_cast<__mmask16>((1u << (limit - full)) - 1);
    const __m512 low = _mm512_set1_ps(kNone);
    const __m512 last = rest ? _mm512_mask_loadu_ps(low, rest, scores + full) : low;
    __m512 most = last;
    for (int i = 0; i < full; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
    float& maximum = floats(plan_.maximum)[query];
    float& total = floats(plan_.total)[query];
    const float block_peak = _mm512_reduce_max_ps(most);
    const float peak = block_peak > maximum ? block_peak : maximum;
    if (before && peak > maximum) rescale(before, exp2f(maximum - peak), total);
    maximum = peak;
    const __m512 offset = _mm512_set1_ps(peak);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < full; i += 16) {
      const __m512 y = exp2_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + i), offset));
      sum = _mm512_add_ps(sum, y);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(chances + i), (__m256i)_mm512_cvtneps_pbh(y));
    }
    int done = full;
    if (rest) {
      const __m512 y = _mm512_maskz_mov_ps(rest, exp2_ps(_mm512_sub_ps(last, offset)));
      sum = _mm512_add_ps(sum, y);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(chances + full), (__m256i)_mm512_cvtneps_pbh(y));
      done += 16;
    }
    memset(chances + done, 0, static_cast<size_t>(width - done) * 2);
    total += _mm512_reduce_add_ps(sum);
  }

  void rescale(float* sums, float factor, float& total) const {
    const __m512 by = _mm512_set1_ps(factor);
    for (size_t i = 0; i < value(); i += 16) {
      _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), by));
    }
    total *= factor;
  }

  void finish() const {
    for (int row = 0; row < head_.queries; ++row) {
      const float* sums = floats(plan_.sums) + static_cast<size_t>(row) * value();
      float* out = head_.out + static_cast<size_t>(row) * head_.out_stride;
      const __m512 by = _mm512_set1_ps(1.0f / floats(plan_.total)[row]);
      for (size_t i = 0; i < value(); i += 16) {
        _mm512_stream_ps(out + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), by));
      }
    }
  }

  const LatentHead& head_;
  const LatentShape& shape_;
  const Plan plan_;
};

}  // namespace

size_t latent_head_scratch(const LatentShape& shape, int queries) { return Plan(shape, queries).bytes; }

void latent_tiles_amx(const uint16_t* from, int rows, size_t width, uint8_t* tiles) {
  for (size_t i = 0; i < width; i += 32, tiles += kTileBytes) {
    __m512i r[16];
    for (int row = 0; row < kTileRows; ++row) {
      r[row] = row < rows ? _mm512_loadu_si512(from + static_cast<size_t>(row) * width + i) : _mm512_setzero_si512();
    }
    transpose(r);
    for (int row = 0; row < kTileRows; ++row) _mm512_storeu_si512(tiles + row * 64, r[row]);
  }
}

void latent_head_amx(const LatentHead& head) { Head(head).run(); }

}  // namespace kt
