// Attention of a group of queries to part of their context, with AMX bf16: see gqa_part.h. Keys are the A operand, as the
// cache holds them, so that a row of scores is one key's for all queries and the softmax needs no sum across a register; pairs
// of rows of values are the B operand.
#include <immintrin.h>

#include <string.h>

#include "amx_vectors.h"
#include "gqa_part.h"
#include "kernels.h"

namespace kt {
namespace {

constexpr int kPair = 2 * kTileRows;     // keys of one step
constexpr size_t kBlockWidth = 64;       // columns of values summed at once, in four tiles
constexpr size_t kLanes = kPartQueries;  // a score of every query
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;

// Where things lie in the scratch.
struct Plan {
  size_t queries, scores, powers, values, last_keys, product, bytes;

  explicit Plan(size_t width)
      : queries(0),
        scores(width / 32 * kTileBytes),
        powers(scores + kPartKeys * kLanes * 4),
        values(powers + kPartKeys / kPair * kTileBytes),
        last_keys(values + 4 * kTileBytes),
        product(last_keys + kPair * width * 2),
        bytes(product + kTileBytes) {}
};

class Part {
 public:
  Part(const float* queries, int count, size_t width, const KeyRows& rows, float scale, uint8_t* scratch, float* out,
       PartialSoftmax* sums)
      : queries_(queries),
        count_(count),
        width_(width),
        rows_(rows),
        scale_(scale),
        scratch_(scratch),
        plan_(width),
        pairs_((rows.count + kPair - 1) / kPair),
        out_(out),
        sums_(sums) {}

  void run() {
    take_queries();
    score();
    raise();
    for (size_t column = 0; column < width_; column += kBlockWidth) mix(column);
  }

 private:
  float* floats(size_t offset) const { return reinterpret_cast<float*>(scratch_ + offset); }
  float* scores(int key) const { return floats(plan_.scores) + static_cast<size_t>(key) * kLanes; }

  // B tiles, scaled so that powers are of two; queries that are not there are 0.
  void take_queries() const {
    const __m512 scale = _mm512_set1_ps(scale_ * kLog2e);
    for (size_t column = 0; column < width_; column += 32) {
      __m512i r[16];
      for (int q = 0; q < kPartQueries; ++q) {
        r[q] = _mm512_setzero_si512();
        if (q >= count_) continue;
        const float* from = queries_ + static_cast<size_t>(q) * width_ + column;
        const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(from), scale);
        r[q] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_loadu_ps(from + 16), scale), low);
      }
      transpose(r);
      uint8_t* tile = scratch_ + plan_.queries + column / 32 * kTileBytes;
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * 64, r[i]);
    }
  }

  // The keys of a step: in the cache, or copied where fewer than kPair are left.
  const uint16_t* keys(int pair, size_t& stride) const {
    const uint16_t* from = rows_.keys + static_cast<size_t>(pair) * kPair * rows_.stride;
    const int left = rows_.count - pair * kPair;
    stride = rows_.stride;
    if (left >= kPair) return from;
    auto* copy = reinterpret_cast<uint16_t*>(scratch_ + plan_.last_keys);
    for (int i = 0; i < left; ++i) {
      memcpy(copy + static_cast<size_t>(i) * width_, from + static_cast<size_t>(i) * stride, width_ * 2);
    }
    memset(copy + static_cast<size_t>(left) * width_, 0, static_cast<size_t>(kPair - left) * width_ * 2);
    stride = width_;
    return copy;
  }

  // Rows lie pages apart: no hardware prefetch finds them.
  void prefetch(const uint16_t* base, int pair, size_t column, size_t width) const {
    if (pair >= pairs_) return;
    const int count = rows_.count - pair * kPair;
    for (int i = 0; i < kPair && i < count; ++i) {
      const uint16_t* row = base + static_cast<size_t>(pair * kPair + i) * rows_.stride + column;
      for (size_t c = 0; c < width; c += 32) _mm_prefetch(reinterpret_cast<const char*>(row + c), _MM_HINT_T0);
    }
  }

  // Scores [key][query].
  void score() const {
    for (int pair = 0; pair < pairs_; ++pair) {
      size_t stride;
      const uint16_t* from = keys(pair, stride);
      prefetch(rows_.keys, pair + 1, 0, width_);
      _tile_zero(0);
      _tile_zero(1);
      for (size_t column = 0; column < width_; column += 32) {
        _tile_loadd(2, scratch_ + plan_.queries + column / 32 * kTileBytes, 64);
        _tile_loadd(3, from + column, stride * 2);
        _tile_loadd(4, from + kTileRows * stride + column, stride * 2);
        _tile_dpbf16ps(0, 3, 2);
        _tile_dpbf16ps(1, 4, 2);
      }
      _tile_stored(0, scores(pair * kPair), 64);
      _tile_stored(1, scores(pair * kPair + kTileRows), 64);
    }
  }

  // Powers of two of the scores less the largest, as A tiles [query][key]; and what the sums say.
  void raise() const {
    __m512 largest = _mm512_set1_ps(-__builtin_inff());
    for (int key = 0; key < rows_.count; ++key) largest = _mm512_max_ps(_mm512_loadu_ps(scores(key)), largest);
    __m512 total = _mm512_setzero_ps();
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int pair = 0; pair < pairs_; ++pair) {
      __m512i r[16];
      for (int i = 0; i < kTileRows; ++i) {
        const int key = pair * kPair + 2 * i;
        __m512 power[2];
        for (int j = 0; j < 2; ++j) {
          power[j] = _mm512_setzero_ps();
          if (key + j < rows_.count) {
            power[j] = exp2_ps(_mm512_sub_ps(_mm512_loadu_ps(scores(key + j)), largest));
            total = _mm512_add_ps(total, power[j]);
          }
        }
        r[i] = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(power[1], power[0]));
      }
      transpose(r);
      uint8_t* tile = scratch_ + plan_.powers + static_cast<size_t>(pair) * kTileBytes;
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * 64, r[i]);
    }
    float maxima[kLanes], totals[kLanes];
    _mm512_storeu_ps(maxima, largest);
    _mm512_storeu_ps(totals, total);
    for (int q = 0; q < count_; ++q) sums_[q] = {maxima[q] * kLn2, totals[q]};
  }

  // Values of a step as B tiles [pair of keys][column][2], 16 columns each, `halves` times 32; keys beyond the end are 0.
  void take_values(int pair, size_t column, int halves) const {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int i = 0; i < kTileRows; ++i) {
      const int key = pair * kPair + 2 * i;
      const uint16_t* even = rows_.values + static_cast<size_t>(key) * rows_.stride + column;
      for (int half = 0; half < halves; ++half) {
        const __m512i zero = _mm512_setzero_si512();
        const __m512i first = key < rows_.count ? _mm512_loadu_si512(even + half * 32) : zero;
        const __m512i second = key + 1 < rows_.count ? _mm512_loadu_si512(even + rows_.stride + half * 32) : zero;
        uint8_t* tile = scratch_ + plan_.values + half * 2 * kTileBytes + i * 64;
        _mm512_storeu_si512(tile, _mm512_permutex2var_epi16(first, low, second));
        _mm512_storeu_si512(tile + kTileBytes, _mm512_permutex2var_epi16(first, high, second));
      }
    }
  }

  // out [query][column...] for one or two times 32 columns.
  void mix(size_t column) const {
    const bool is_wide = width_ - column >= kBlockWidth;
    const uint8_t* values = scratch_ + plan_.values;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int pair = 0; pair < pairs_; ++pair) {
      prefetch(rows_.values, pair + 1, column, is_wide ? 64 : 32);
      take_values(pair, column, is_wide ? 2 : 1);
      _tile_loadd(4, scratch_ + plan_.powers + static_cast<size_t>(pair) * kTileBytes, 64);
      _tile_loadd(5, values, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, values + kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 6);
      if (!is_wide) continue;
      _tile_loadd(7, values + 2 * kTileBytes, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, values + 3 * kTileBytes, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, scratch_ + plan_.product, 64);
    take_product(column);
    _tile_stored(1, scratch_ + plan_.product, 64);
    take_product(column + 16);
    if (!is_wide) return;
    _tile_stored(2, scratch_ + plan_.product, 64);
    take_product(column + 32);
    _tile_stored(3, scratch_ + plan_.product, 64);
    take_product(column + 48);
  }

  void take_product(size_t column) const {
    for (int q = 0; q < count_; ++q) {
      memcpy(out_ + static_cast<size_t>(q) * width_ + column, scratch_ + plan_.product + q * 64, 64);
    }
  }

  const float* queries_;
  const int count_;
  const size_t width_;
  const KeyRows rows_;
  const float scale_;
  uint8_t* const scratch_;
  const Plan plan_;
  const int pairs_;
  float* const out_;
  PartialSoftmax* const sums_;
};

}  // namespace

size_t attend_part_scratch(size_t width) { return Plan(width).bytes; }

void attend_part_amx(const float* queries, int count, size_t width, const KeyRows& rows, float scale, uint8_t* scratch,
                     float* out, PartialSoftmax* sums) {
  Part(queries, count, width, rows, scale, scratch, out, sums).run();
}

}  // namespace kt
