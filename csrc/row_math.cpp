#include "row_math.h"

#include <cmath>
#include <cstring>

#include "clones.h"

// Vectors travel by reference: passing them by value has another ABI in every clone.
#define KT_INLINE inline __attribute__((always_inline))

namespace kt {
namespace {

constexpr size_t kLanes = 16;
using Lanes = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

KT_INLINE void load(Lanes& v, const float* p) { std::memcpy(&v, p, sizeof v); }
KT_INLINE void store(const Lanes& v, float* p) { std::memcpy(p, &v, sizeof v); }

KT_INLINE void load(Lanes& v, const uint16_t* p) {
  Halves half;
  std::memcpy(&half, p, sizeof half);
  const Words wide = __builtin_convertvector(half, Words) << 16;
  std::memcpy(&v, &wide, sizeof v);
}

// The last `count` < 16 numbers of a row, the other lanes 0.
template <typename T>
KT_INLINE void load_tail(Lanes& v, const T* p, size_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  load(v, padded);
}

KT_INLINE void store_tail(const Lanes& v, float* p, size_t count) { std::memcpy(p, &v, count * sizeof(float)); }

KT_INLINE float sum(const Lanes& v) {
  float lanes[kLanes];
  store(v, lanes);
  for (size_t width = kLanes / 2; width > 0; width /= 2) {
    for (size_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// e^x with a relative error of about 2^-23 between -87 and 88; 0 below, e^88 above. x = n ln 2 + r, |r| <= ln 2 / 2: Taylor's
// polynomial of degree 7 leaves 2^-27. NaN stays NaN.
KT_INLINE void exponential(Lanes& x) {
  const Lanes limited = x > 88.0f ? Lanes{} + 88.0f : x;
  const Lanes magic = Lanes{} + 12582912.0f;  // 1.5 * 2^23 rounds to the nearest integer
  const Lanes shifted = limited * 1.44269504088896341f + magic;
  const Lanes n = shifted - magic;
  const Lanes r = (limited - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  Lanes p = Lanes{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Words bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const Words power = (bits - 0x4B400000u + 127u) << 23;
  Lanes scale;
  std::memcpy(&scale, &power, sizeof scale);
  const Lanes value = p * scale;
  x = x < -87.0f ? Lanes{} : value;
}

KT_INLINE void silu(Lanes& x) {
  Lanes e = -x;
  exponential(e);
  x = x / (1.0f + e);
}

KT_INLINE void load(Lanes& v, const int32_t* p) {
  Words bits;
  std::memcpy(&bits, p, sizeof bits);
  using Signed = int32_t __attribute__((vector_size(64)));
  v = __builtin_convertvector(reinterpret_cast<Signed&>(bits), Lanes);
}

// Comparisons that are false for NaN keep it.
template <typename T>
KT_INLINE void gate_rows(const EpilogueArgs& e, const float* bias, const GateShape& gate) {
  const Lanes high = Lanes{} + gate.limit, low = -high;
  Lanes scales[2] = {}, biases[2] = {};
  for (size_t tile = 0; tile < 2; ++tile) {
    if (e.scale_a) load(scales[tile], e.scale_b + tile * kLanes);
    if (bias) load(biases[tile], bias + tile * kLanes);
  }
  for (int r = 0; r < e.rows; ++r) {
    Lanes value[2];
    for (size_t tile = 0; tile < 2; ++tile) {
      load(value[tile], static_cast<const T*>(e.c) + static_cast<size_t>(r) * kStripCols + tile * kLanes);
      if (e.scale_a) value[tile] *= scales[tile] * e.scale_a[r];
      value[tile] += biases[tile];
    }
    const Lanes g = value[0] > high ? high : value[0];
    Lanes u = value[1] > high ? high : value[1];
    u = u < low ? low : u;
    Lanes power = g * -gate.alpha;
    exponential(power);
    const Lanes out = g / (1.0f + power) * (u + gate.up_offset);
    store(out, e.h + static_cast<size_t>(r) * e.h_stride);
  }
}

template <typename T>
KT_INLINE void dot_rows(const float* x, const T* matrix, int rows, size_t n, float* out) {
  const size_t whole = n / kLanes * kLanes, tail = n - whole;
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    Lanes acc[4] = {};
    const T* row = matrix + static_cast<size_t>(r) * n;
    for (size_t c = 0; c <= whole; c += kLanes) {
      if (c == whole && tail == 0) break;
      Lanes a, b;
      if (c < whole) {
        load(a, x + c);
      } else {
        load_tail(a, x + c, tail);
      }
      for (size_t i = 0; i < 4; ++i) {
        __builtin_prefetch(row + (i + 4) * n + c);  // the next four rows: nothing else asks for them so early
        if (c < whole) {
          load(b, row + i * n + c);
        } else {
          load_tail(b, row + i * n + c, tail);
        }
        acc[i] += a * b;
      }
    }
    for (int i = 0; i < 4; ++i) out[r + i] = sum(acc[i]);
  }
  for (; r < rows; ++r) {
    Lanes acc = {};
    const T* row = matrix + static_cast<size_t>(r) * n;
    Lanes a, b;
    for (size_t c = 0; c < whole; c += kLanes) {
      load(a, x + c);
      load(b, row + c);
      acc += a * b;
    }
    if (tail) {
      load_tail(a, x + whole, tail);
      load_tail(b, row + whole, tail);
      acc += a * b;
    }
    out[r] = sum(acc);
  }
}

// out[q][c] += sum over kRows rows of weights[q][r] * rows[r][c] for columns [0, n).
template <int kQueries, int kRows>
KT_INLINE void add_rows(const float* const* weights, const uint16_t* rows, size_t stride, size_t n, float* out,
                        size_t out_stride) {
  for (size_t c = 0; c < n; c += kLanes) {
    const size_t count = n - c < kLanes ? n - c : kLanes;
    Lanes row[kRows];
    for (int r = 0; r < kRows; ++r) {
      const uint16_t* at = rows + static_cast<size_t>(r) * stride + c;
      __builtin_prefetch(at + kRows * stride);
      if (count == kLanes) {
        load(row[r], at);
      } else {
        load_tail(row[r], at, count);
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      float* at = out + static_cast<size_t>(q) * out_stride + c;
      Lanes acc;
      if (count == kLanes) {
        load(acc, at);
      } else {
        load_tail(acc, at, count);
      }
      for (int r = 0; r < kRows; ++r) acc += row[r] * weights[q][r];
      if (count == kLanes) {
        store(acc, at);
      } else {
        store_tail(acc, at, count);
      }
    }
  }
}

template <int kQueries>
KT_INLINE void add_all_rows(const float* weights, size_t weight_stride, const uint16_t* rows, size_t stride, int count,
                            size_t n, float* out, size_t out_stride) {
  for (int q = 0; q < kQueries; ++q) std::memset(out + static_cast<size_t>(q) * out_stride, 0, n * sizeof(float));
  const float* at[kQueries];
  int r = 0;
  for (; r + 4 <= count; r += 4) {
    for (int q = 0; q < kQueries; ++q) at[q] = weights + static_cast<size_t>(q) * weight_stride + r;
    add_rows<kQueries, 4>(at, rows + static_cast<size_t>(r) * stride, stride, n, out, out_stride);
  }
  for (; r < count; ++r) {
    for (int q = 0; q < kQueries; ++q) at[q] = weights + static_cast<size_t>(q) * weight_stride + r;
    add_rows<kQueries, 1>(at, rows + static_cast<size_t>(r) * stride, stride, n, out, out_stride);
  }
}

// scores[q][k] = query q . key k.
template <int kQueries>
KT_INLINE void score_keys(const float* queries, size_t width, const uint16_t* rows, size_t stride, int keys,
                          float* scores) {
  const size_t whole = width / kLanes * kLanes, tail = width - whole;
  for (int k = 0; k < keys; ++k) {
    const uint16_t* key = rows + static_cast<size_t>(k) * stride;
    Lanes acc[kQueries] = {};
    Lanes a, b;
    for (size_t c = 0; c < whole; c += kLanes) {
      load(b, key + c);
      for (int q = 0; q < kQueries; ++q) {
        load(a, queries + static_cast<size_t>(q) * width + c);
        acc[q] += a * b;
      }
    }
    if (tail) {
      load_tail(b, key + whole, tail);
      for (int q = 0; q < kQueries; ++q) {
        load_tail(a, queries + static_cast<size_t>(q) * width + whole, tail);
        acc[q] += a * b;
      }
    }
    for (int q = 0; q < kQueries; ++q) scores[static_cast<size_t>(q) * keys + k] = sum(acc[q]);
  }
}

// scores become e^(scale (score - largest)).
KT_INLINE void powers(float* scores, int n, float scale, PartialSoftmax& sums) {
  float largest = scores[0];
  for (int i = 1; i < n; ++i) largest = scores[i] > largest ? scores[i] : largest;
  Lanes total = {};
  const size_t count = static_cast<size_t>(n);
  for (size_t i = 0; i < count; i += kLanes) {
    Lanes v;
    if (i + kLanes <= count) {
      load(v, scores + i);
    } else {
      v = Lanes{} - INFINITY;
      std::memcpy(&v, scores + i, (count - i) * sizeof(float));
    }
    v = (v - largest) * scale;
    exponential(v);
    total += v;
    store_tail(v, scores + i, i + kLanes <= count ? kLanes : count - i);
  }
  sums = {largest * scale, sum(total)};
}

// scores become probabilities of the softmax of scale * scores.
KT_INLINE void softmax(float* scores, int n, float scale) {
  PartialSoftmax sums;
  powers(scores, n, scale, sums);
  const float inverse = 1.0f / sums.total;
  for (int i = 0; i < n; ++i) scores[i] *= inverse;
}

template <int kQueries>
KT_INLINE void attend(const float* queries, size_t width, const uint16_t* rows, size_t stride, int keys,
                      size_t value_width, float scale, float* scores, float* out) {
  score_keys<kQueries>(queries, width, rows, stride, keys, scores);
  for (int q = 0; q < kQueries; ++q) softmax(scores + static_cast<size_t>(q) * keys, keys, scale);
  add_all_rows<kQueries>(scores, static_cast<size_t>(keys), rows, stride, keys, value_width, out, value_width);
}

template <int kQueries>
KT_INLINE void attend_part(const float* queries, size_t width, const KeyRows& rows, float scale, float* scores,
                           float* out, PartialSoftmax* sums) {
  const auto count = static_cast<size_t>(rows.count);
  score_keys<kQueries>(queries, width, rows.keys, rows.stride, rows.count, scores);
  for (size_t q = 0; q < kQueries; ++q) powers(scores + q * count, rows.count, scale, sums[q]);
  add_all_rows<kQueries>(scores, count, rows.values, rows.stride, rows.count, width, out, width);
}

}  // namespace

KT_CLONES void rms_norm(const float* x, const float* scaled_weight, size_t n, float sum_eps, float* out) {
  Lanes squares = {}, v, w;
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load(v, x + i);
    squares += v * v;
  }
  if (i < n) {
    load_tail(v, x + i, n - i);
    squares += v * v;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) + sum_eps);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    load(v, x + i);
    load(w, scaled_weight + i);
    store(v * scale * w, out + i);
  }
  for (; i < n; ++i) out[i] = x[i] * scale * scaled_weight[i];
}

KT_CLONES void rotate_pairs(float* x, const float* rotation, size_t pairs) {
  for (size_t i = 0; i < pairs; ++i) {
    const float re = x[2 * i], im = x[2 * i + 1], cosine = rotation[2 * i], sine = rotation[2 * i + 1];
    x[2 * i] = re * cosine - im * sine;
    x[2 * i + 1] = re * sine + im * cosine;
  }
}

KT_CLONES void silu_mul(const float* gate, const float* up, size_t n, float* out) {
  Lanes g, u;
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load(g, gate + i);
    load(u, up + i);
    silu(g);
    store(g * u, out + i);
  }
  if (i < n) {
    load_tail(g, gate + i, n - i);
    load_tail(u, up + i, n - i);
    silu(g);
    store_tail(g * u, out + i, n - i);
  }
}

KT_CLONES void gate_mul(const EpilogueArgs& args, bool is_int8, const float* bias, const GateShape& gate) {
  if (is_int8) {
    gate_rows<int32_t>(args, bias, gate);
  } else {
    gate_rows<float>(args, bias, gate);
  }
}

KT_CLONES void add_weighted_bias(const EpilogueArgs& args, const float* bias) {
  for (int r = 0; r < args.rows; ++r) {
    float* y = static_cast<float*>(args.out) + static_cast<size_t>(args.token[r]) * args.out_stride;
    for (int col = 0; col < args.cols; ++col) y[col] += args.weight[r] * bias[col];
  }
}

KT_CLONES void add_scaled(float* y, const float* x, float scale, size_t n) {
  for (size_t i = 0; i < n; ++i) y[i] += scale * x[i];
}

KT_CLONES void round_bf16(const float* x, size_t n, uint16_t* out) {
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
}

KT_CLONES void dot_rows_f32(const float* x, const float* matrix, int rows, size_t n, float* out) {
  dot_rows(x, matrix, rows, n, out);
}

KT_CLONES void dot_rows_bf16(const float* x, const uint16_t* matrix, int rows, size_t n, float* out) {
  dot_rows(x, matrix, rows, n, out);
}

KT_CLONES void sum_rows_bf16(const float* x, const uint16_t* matrix, int rows, size_t n, float* out) {
  add_all_rows<1>(x, 0, matrix, n, rows, n, out, n);
}

KT_CLONES void attend_shared_bf16(const float* queries, int count, size_t width, const uint16_t* rows,
                                  size_t key_stride, int keys, size_t value_width, float scale, float* scores,
                                  float* out) {
  switch (count) {
    case 4:
      return attend<4>(queries, width, rows, key_stride, keys, value_width, scale, scores, out);
    case 3:
      return attend<3>(queries, width, rows, key_stride, keys, value_width, scale, scores, out);
    case 2:
      return attend<2>(queries, width, rows, key_stride, keys, value_width, scale, scores, out);
    default:
      return attend<1>(queries, width, rows, key_stride, keys, value_width, scale, scores, out);
  }
}

KT_CLONES void attend_part_bf16(const float* queries, int count, size_t width, const KeyRows& rows, float scale,
                                float* scores, float* out, PartialSoftmax* sums) {
  switch (count) {
    case 4:
      return attend_part<4>(queries, width, rows, scale, scores, out, sums);
    case 3:
      return attend_part<3>(queries, width, rows, scale, scores, out, sums);
    case 2:
      return attend_part<2>(queries, width, rows, scale, scores, out, sums);
    default:
      return attend_part<1>(queries, width, rows, scale, scores, out, sums);
  }
}

}  // namespace kt
