#include "quantize.h"

#include "block_pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

// The search loops run as wide as the CPU allows. Lanes are independent and summed in a fixed order, and contraction is
// off, so every clone gives the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)
#define KT_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define KT_CLONES
#endif

namespace kt {
namespace {

constexpr int kLanes = 16;
constexpr float kTiny = 1e-30f;  // rows below this are stored as zeros: their inverse would overflow
constexpr float kRoundMagic =
    12582912.0f;                    // 1.5 * 2^23: adding it rounds a float below 2^22 to the nearest even integer
constexpr int kMaxGroupScale = 16;  // s <= 16 keeps s * 15 below 256 and s * q - z within int8

inline float round_even(float x) { return (x + kRoundMagic) - kRoundMagic; }

inline float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

void check_finite(const float* row, int cols, int r) {
  for (int c = 0; c < cols; ++c) {
    if (!std::isfinite(row[c])) {
      throw std::invalid_argument("weight at row " + std::to_string(r) + ", column " + std::to_string(c) +
                                  " is not a finite number");
    }
  }
}

constexpr int kExactCols = 32;  // a block of MXFP4

float largest_magnitude(const float* row, int n) {
  int32_t largest = 0;  // bits of positive numbers are in the numbers' order
  for (int i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, row + i, sizeof bits);
    largest = std::max(largest, bits & 0x7FFFFFFF);
  }
  float value;
  std::memcpy(&value, &largest, sizeof value);
  return value;
}

// The scale in which a row of MXFP4 is a row of int8, exactly; 0 for other rows. Such numbers are 2^e or 1.5 * 2^e, so they
// are multiples of the row's smallest 2^e or half of that; the largest may be 127 of these. Most rows end at their first
// number that has more bits.
float exact_scale(const float* row, int n, float largest) {
  uint32_t unit = 255;
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, row + i, sizeof bits);
    if ((bits & 0x7FFFFFFF) == 0) continue;
    const uint32_t exponent = bits >> 23 & 255, half = bits >> 22 & 1;
    if ((bits & 0x3FFFFF) != 0 || exponent < 2) return 0.0f;
    unit = std::min(unit, exponent - half);
  }
  const uint32_t scale_bits = unit << 23;
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof scale);
  // Fewer than 8 multiples are no row of MXFP4, whose blocks have 12.
  return largest <= 127.0f * scale && largest >= 8.0f * scale ? scale : 0.0f;
}

// Sum of squared errors of w ~ step * (q - offset), q = clamp(round(w / step + offset), 0, 15).
KT_CLONES float code_error(const float* w, int n, float step, float offset) {
  float lanes[kLanes] = {};
  const float inverse = 1.0f / step;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      float q = round_even(w[i + l] * inverse + offset);
      q = q < 0.0f ? 0.0f : q;
      q = q > 15.0f ? 15.0f : q;
      const float error = step * (q - offset) - w[i + l];
      lanes[l] += error * error;
    }
  }
  for (; i < n; ++i) {
    const float error = step * (clamp(round_even(w[i] * inverse + offset), 0.0f, 15.0f) - offset) - w[i];
    lanes[0] += error * error;
  }
  float total = 0.0f;
  for (float lane : lanes) total += lane;
  return total;
}

struct Range {
  float low;
  float high;
};

// The [low, high] grid of 16 points with the least squared error, by shrinking the group's own range. The range reaches
// down (or up) to zero: z cannot be negative.
Range best_range(const float* w, int n) {
  float low = 0.0f, high = 0.0f;
  for (int i = 0; i < n; ++i) {
    low = std::fmin(low, w[i]);
    high = std::fmax(high, w[i]);
  }
  if (high - low < kTiny) return {low, high};
  Range best = {low, high};
  float best_error = INFINITY;
  for (float shrink = 1.0f; shrink > 0.65f; shrink -= 0.05f) {
    const float step = (high - low) * shrink / 15.0f;
    const float error = code_error(w, n, step, -low * shrink / step);
    if (error < best_error) {
      best_error = error;
      best = {low * shrink, high * shrink};
    }
  }
  return best;
}

struct GroupCode {
  int s;
  int z;
};

// Integers s, z near the wanted range that minimise the true error, with s * q - z inside int8 for every code.
GroupCode best_group_code(const float* w, int n, Range range, float row_scale) {
  GroupCode best = {1, 8};
  float best_error = INFINITY;
  const int ideal_s = static_cast<int>(round_even(clamp((range.high - range.low) / (15.0f * row_scale), 1.0f, 16.0f)));
  for (int s = ideal_s - 1; s <= ideal_s + 1; ++s) {
    if (s < 1 || s > kMaxGroupScale) continue;
    const int z_min = s * 15 - 127 > 0 ? s * 15 - 127 : 0;
    const float center = (range.low + range.high) / (2.0f * row_scale);
    const int ideal_z = static_cast<int>(round_even(clamp(7.5f * static_cast<float>(s) - center, 0.0f, 255.0f)));
    for (int shift = -2; shift <= 2; ++shift) {
      const int z = ideal_z + shift * (s + 3) / 4;
      if (z < z_min || z > 128) continue;
      const float step = row_scale * static_cast<float>(s);
      const float error = code_error(w, n, step, static_cast<float>(z) / static_cast<float>(s));
      if (error < best_error) {
        best_error = error;
        best = {s, z};
      }
    }
  }
  if (best_error == INFINITY) {  // the ideal z lay outside: take the nearest legal one
    best.s = ideal_s;
    best.z = ideal_s * 15 - 127 > 0 ? ideal_s * 15 - 127 : 0;
    const float center = (range.low + range.high) / (2.0f * row_scale);
    if (7.5f * static_cast<float>(ideal_s) - center > 128.0f) best.z = 128;
  }
  return best;
}

// Scales the row by a power of two (exactly) so that its largest magnitude lies in [0.5, 1): squared errors then neither
// overflow nor vanish. Returns the exponent to put back.
int normalise_row(float* w, int k) {
  int exponent = 0;
  std::frexp(largest_magnitude(w, k), &exponent);
  for (int i = 0; i < k; ++i) w[i] = std::ldexp(w[i], -exponent);
  return exponent;
}

// One row of int4: codes[padded] one per byte, then s and z per group.
void quantize_row_int4(const float* w, int k, int padded, int group, uint8_t* codes, uint8_t* s, uint8_t* z,
                       float* row_scale) {
  const int groups = padded / group;
  std::vector<Range> ranges(static_cast<size_t>(groups), Range{0.0f, 0.0f});
  float widest = 0.0f, largest = 0.0f;
  for (int g = 0; g * group < k; ++g) {
    const int n = k - g * group < group ? k - g * group : group;
    ranges[g] = best_range(w + g * group, n);
    widest = std::fmax(widest, ranges[g].high - ranges[g].low);
    largest = std::fmax(largest, std::fmax(std::fabs(ranges[g].low), std::fabs(ranges[g].high)));
  }
  const float scale = std::fmax(widest / (15.0f * kMaxGroupScale), largest / 127.0f);
  *row_scale = scale < kTiny ? 0.0f : scale;
  for (int g = 0; g < groups; ++g) {
    const int n = k - g * group < group ? (k - g * group > 0 ? k - g * group : 0) : group;
    uint8_t* out = codes + g * group;
    std::memset(out, 8, group);
    s[g] = 1;
    z[g] = 8;
    if (*row_scale == 0.0f || n == 0) continue;
    const GroupCode code = best_group_code(w + g * group, n, ranges[g], scale);
    s[g] = static_cast<uint8_t>(code.s);
    z[g] = static_cast<uint8_t>(code.z);
    const float inverse = 1.0f / (scale * static_cast<float>(code.s));
    const float offset = static_cast<float>(code.z) / static_cast<float>(code.s);
    for (int i = 0; i < n; ++i) {
      out[i] = static_cast<uint8_t>(clamp(round_even(w[g * group + i] * inverse + offset), 0.0f, 15.0f));
    }
  }
}

KT_CLONES void quantize_row_int8(const float* w, int k, float inverse, int8_t* q) {
  for (int i = 0; i < k; ++i) q[i] = static_cast<int8_t>(static_cast<int>(round_even(w[i] * inverse)));
}

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Column of a strip and, within its tile, the byte offset of input feature k in the int8 order.
inline size_t int8_offset(int k, int col) {
  return static_cast<size_t>(k / 64) * kStripStepBytes + (col / 16) * kTileBytes + (k % 64 / 4) * 64 + (col % 16) * 4 +
         k % 4;
}

// Calls visit(k, code offset, is_high_nibble, group header offset) for every input feature of one strip column.
template <typename Visit>
void visit_int4(const FormatInfo& info, int k_padded, int col, Visit visit) {
  const int block_steps = int4_block_steps(info.k_group), headers = int4_headers(info.k_group);
  for (int k = 0; k < k_padded; ++k) {
    const int step = k / 64, k4 = k % 64 / 4;
    const size_t block = static_cast<size_t>(step / block_steps) * int4_block_bytes(info.k_group);
    const size_t header = block + (headers == 2 && k4 >= 8 ? kInt4HeaderBytes : 0);
    const size_t codes = block + headers * kInt4HeaderBytes + (step % block_steps) * kTileBytes;
    visit(k, codes + (col / 16) * 512 + (k4 % 8) * 64 + (col % 16) * 4 + k % 4, k4 >= 8, header);
  }
}

// One matrix of an expert into its strips. column(row) gives the strip and the column of a weight row.
template <typename Column>
void pack_matrix(const StripShape& shape, const MatrixView& w, uint8_t* strips, float* scales, Column column) {
  const FormatInfo& info = *shape.info;
  std::vector<float> row(static_cast<size_t>(w.cols));
  std::vector<uint8_t> codes(static_cast<size_t>(shape.k_padded()) * 2), s, z;
  if (info.k_group) {
    s.resize(static_cast<size_t>(shape.k_padded() / info.k_group));
    z.resize(s.size());
  }
  const CodeView view = {codes.data(), s.data(), z.data(), 1, w.cols};
  for (int r = 0; r < w.rows; ++r) {
    const MatrixView one = {static_cast<const char*>(w.data) + static_cast<size_t>(r) * w.cols * (w.is_bf16 ? 2 : 4),
                            w.is_bf16, 1, w.cols};
    const auto [strip, col] = column(r);
    float scale = 0.0f;
    try {
      if (info.format == Format::kBf16) {
        one.row(0, row.data());
        check_finite(row.data(), w.cols, 0);
        for (int k = 0; k < w.cols; ++k) {
          const uint16_t bits = float_to_bf16(row[k]);
          std::memcpy(codes.data() + 2 * k, &bits, 2);
        }
      } else if (info.k_group) {
        quantize_int4(one, info.k_group, codes.data(), s.data(), z.data(), &scale);
      } else {
        quantize_int8(one, reinterpret_cast<int8_t*>(codes.data()), &scale);
      }
    } catch (const std::invalid_argument&) {
      one.row(0, row.data());
      check_finite(row.data(), w.cols, r);  // again, for the message with the true row
      throw;
    }
    place_row(info, view, 0, strips + strip * shape.strip_bytes(), col);
    if (scales) scales[strip * kStripCols + col] = scale;
  }
}

void unpack_strip_row(const StripShape& shape, const uint8_t* strip, const float* scales, int col, float* out) {
  if (shape.info->format == Format::kBf16) {
    const uint8_t* base = strip + (col / 16) * kTileBytes + (col % 16) * 4;
    for (int k = 0; k < shape.k; ++k) {
      uint16_t bits;
      std::memcpy(&bits, base + static_cast<size_t>(k / 32) * kStripStepBytes + (k % 32 / 2) * 64 + (k % 2) * 2, 2);
      out[k] = bf16_to_float(bits);
    }
    return;
  }
  const float scale = scales[col];
  if (shape.info->k_group == 0) {
    const uint8_t* base = strip + int8_offset(0, col);
    for (int k = 0; k < shape.k; ++k) {
      out[k] = scale * static_cast<float>(static_cast<int8_t>(
                           base[static_cast<size_t>(k / 64) * kStripStepBytes + (k % 64 / 4) * 64 + k % 4]));
    }
    return;
  }
  visit_int4(*shape.info, shape.k_padded(), col, [&](int k, size_t at, bool high, size_t header) {
    if (k >= shape.k) return;
    const int code = high ? strip[at] >> 4 : strip[at] & 15;
    out[k] = scale * static_cast<float>(strip[header + col] * code - strip[header + kStripCols + col]);
  });
}

}  // namespace

void MatrixView::row(int r, float* out) const {
  const size_t begin = static_cast<size_t>(r) * cols;
  if (!is_bf16) {
    std::memcpy(out, static_cast<const float*>(data) + begin, sizeof(float) * cols);
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(data) + begin;
  for (int c = 0; c < cols; ++c) out[c] = bf16_to_float(bits[c]);
}

void quantize_int8(const MatrixView& w, int8_t* q, float* row_scale) {
  std::vector<float> row(static_cast<size_t>(w.cols));
  for (int r = 0; r < w.rows; ++r) {
    w.row(r, row.data());
    check_finite(row.data(), w.cols, r);
    const float amax = largest_magnitude(row.data(), w.cols);
    int8_t* codes = q + static_cast<size_t>(r) * w.cols;
    const float exact = w.cols >= kExactCols && amax >= kTiny ? exact_scale(row.data(), w.cols, amax) : 0.0f;
    row_scale[r] = exact > 0.0f ? exact : amax < kTiny ? 0.0f : amax / 127.0f;
    quantize_row_int8(row.data(), w.cols, exact > 0.0f ? 1.0f / exact : amax < kTiny ? 0.0f : 127.0f / amax, codes);
  }
}

void quantize_int4(const MatrixView& w, int group, uint8_t* q, uint8_t* s, uint8_t* z, float* row_scale) {
  const int padded = static_cast<int>(round_up(w.cols, group));
  std::vector<float> row(static_cast<size_t>(w.cols));
  std::vector<uint8_t> codes(static_cast<size_t>(padded));
  for (int r = 0; r < w.rows; ++r) {
    w.row(r, row.data());
    check_finite(row.data(), w.cols, r);
    const size_t groups = static_cast<size_t>(padded / group);
    const bool is_tiny = largest_magnitude(row.data(), w.cols) < kTiny;
    const int exponent = is_tiny ? 0 : normalise_row(row.data(), w.cols);
    if (is_tiny) std::fill(row.begin(), row.end(), 0.0f);
    quantize_row_int4(row.data(), w.cols, padded, group, codes.data(), s + r * groups, z + r * groups, row_scale + r);
    row_scale[r] = std::ldexp(row_scale[r], exponent);
    uint8_t* out = q + static_cast<size_t>(r) * padded / 2;
    for (int i = 0; i < padded / 2; ++i) out[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  }
}

namespace {

// 4 bytes at a time: a strip column is one 4-byte lane of every 64-byte line. `bytes` of a row, zero-padded to lanes.
void place_lanes(const uint8_t* row, size_t bytes, uint8_t* strip, int col) {
  uint8_t* base = strip + (col / 16) * kTileBytes + (col % 16) * 4;
  for (size_t at = 0; at < bytes; at += 4) {
    uint8_t* lane = base + at / kStepBytes * kStripStepBytes + at % kStepBytes / 4 * 64;
    std::memcpy(lane, row + at, bytes - at < 4 ? bytes - at : 4);
  }
}

// Four codes of input features k .. k + 3 as four bytes; features that are not stored have the neutral code 8.
uint32_t four_codes(const uint8_t* q, int k, int stored) {
  if (k >= stored) return 0x08080808u;
  const uint32_t pairs = static_cast<uint32_t>(q[k / 2] | q[k / 2 + 1] << 8);
  return (pairs & 15u) | (pairs & 0xf0u) << 4 | (pairs & 0xf00u) << 8 | (pairs & 0xf000u) << 12;
}

}  // namespace

void place_row(const FormatInfo& info, const CodeView& codes, int row, uint8_t* strip, int col) {
  const size_t width = info.format == Format::kBf16 ? 2 : 1;
  if (info.k_group == 0) {
    const size_t bytes = static_cast<size_t>(codes.k) * width;
    place_lanes(static_cast<const uint8_t*>(codes.q) + static_cast<size_t>(row) * bytes, bytes, strip, col);
    return;
  }
  // Storage groups may be padded less than strips are (a group of 32 in a k-step of 64): codes beyond them stay neutral.
  const int stored = static_cast<int>(round_up(codes.k, info.k_group));
  const int padded = StripShape{codes.n, codes.k, &info}.k_padded();
  const uint8_t* q = static_cast<const uint8_t*>(codes.q) + static_cast<size_t>(row) * stored / 2;
  const size_t groups = static_cast<size_t>(stored / info.k_group);
  const int block_steps = int4_block_steps(info.k_group), headers = int4_headers(info.k_group);
  for (int group = 0; group * info.k_group < padded; ++group) {
    const bool inside = static_cast<size_t>(group) < groups;
    const int block = group / headers;
    uint8_t* header =
        strip + static_cast<size_t>(block) * int4_block_bytes(info.k_group) + group % headers * kInt4HeaderBytes;
    header[col] = inside ? codes.s[row * groups + group] : 1;
    header[kStripCols + col] = inside ? codes.z[row * groups + group] : 8;
  }
  for (int step = 0; step < padded / 64; ++step) {
    uint8_t* lanes = strip + static_cast<size_t>(step / block_steps) * int4_block_bytes(info.k_group) +
                     headers * kInt4HeaderBytes + (step % block_steps) * kTileBytes + (col / 16) * 512 + (col % 16) * 4;
    for (int i = 0; i < 8; ++i) {
      const int k = step * 64 + i * 4;
      const uint32_t four = four_codes(q, k, stored) | four_codes(q, k + 32, stored) << 4;
      std::memcpy(lanes + i * 64, &four, 4);
    }
  }
}

void pack_expert(Format format, const MatrixView& gate, const MatrixView& up, const MatrixView& down, uint8_t* blob) {
  const ExpertShape shape(format, gate.cols, gate.rows);
  std::memset(blob, 0, shape.blob_bytes());
  const bool scaled = shape.gate_up.has_scales();
  float* gate_up_scales = scaled ? reinterpret_cast<float*>(blob + shape.gate_up_scales_offset()) : nullptr;
  float* down_scales = scaled ? reinterpret_cast<float*>(blob + shape.down_scales_offset()) : nullptr;
  using Place = std::pair<size_t, int>;
  pack_matrix(shape.gate_up, gate, blob, gate_up_scales, [](int r) { return Place(r / 16, r % 16); });
  pack_matrix(shape.gate_up, up, blob, gate_up_scales, [](int r) { return Place(r / 16, 16 + r % 16); });
  pack_matrix(shape.down, down, blob + shape.down_offset(), down_scales,
              [](int r) { return Place(r / kStripCols, r % kStripCols); });
}

namespace {

// Block formats: back into ggml's rows, and those dequantised as ggml does it.
void unpack_blocks(ExpertFormat format, const uint8_t* blob, int hidden_size, int moe_intermediate_size, float* gate,
                   float* up, float* down) {
  const FormatInfo &in = format_info(format.gate_up), &out = format_info(format.down);
  const size_t in_bytes = ggml_row_bytes(in, hidden_size), out_bytes = ggml_row_bytes(out, moe_intermediate_size);
  const size_t inner = static_cast<size_t>(moe_intermediate_size), hidden = static_cast<size_t>(hidden_size);
  std::vector<uint8_t> rows(2 * inner * in_bytes + hidden * out_bytes);
  uint8_t *up_rows = rows.data() + inner * in_bytes, *down_rows = up_rows + inner * in_bytes;
  unpack_ggml_expert(format, hidden_size, moe_intermediate_size, blob, rows.data(), up_rows, down_rows);
  for (size_t r = 0; r < inner; ++r) {
    dequantize_row(in, rows.data() + r * in_bytes, hidden_size, gate + r * hidden);
    dequantize_row(in, up_rows + r * in_bytes, hidden_size, up + r * hidden);
  }
  for (size_t r = 0; r < hidden; ++r)
    dequantize_row(out, down_rows + r * out_bytes, moe_intermediate_size, down + r * inner);
}

}  // namespace

void unpack_row(const ExpertShape& shape, const uint8_t* blob, ExpertMatrix matrix, int row, float* out) {
  if (matrix == ExpertMatrix::kDown) {
    const auto strip = static_cast<size_t>(row / kStripCols);
    const float* scales = reinterpret_cast<const float*>(blob + shape.down_scales_offset()) + strip * kStripCols;
    unpack_strip_row(shape.down, blob + shape.down_offset() + strip * shape.down.strip_bytes(), scales,
                     row % kStripCols, out);
    return;
  }
  const auto strip = static_cast<size_t>(row / 16);  // 16 rows of gate, then 16 of up
  const float* scales = reinterpret_cast<const float*>(blob + shape.gate_up_scales_offset()) + strip * kStripCols;
  const int col = (matrix == ExpertMatrix::kUp ? 16 : 0) + row % 16;
  unpack_strip_row(shape.gate_up, blob + strip * shape.gate_up.strip_bytes(), scales, col, out);
}

void unpack_expert(ExpertFormat format, const uint8_t* blob, int hidden_size, int moe_intermediate_size, float* gate,
                   float* up, float* down) {
  if (format_info(format.gate_up).is_block()) {
    unpack_blocks(format, blob, hidden_size, moe_intermediate_size, gate, up, down);
    return;
  }
  const ExpertShape shape(format, hidden_size, moe_intermediate_size);
  for (int r = 0; r < moe_intermediate_size; ++r) {
    const size_t at = static_cast<size_t>(r) * static_cast<size_t>(hidden_size);
    unpack_row(shape, blob, ExpertMatrix::kGate, r, gate + at);
    unpack_row(shape, blob, ExpertMatrix::kUp, r, up + at);
  }
  for (int r = 0; r < hidden_size; ++r) {
    unpack_row(shape, blob, ExpertMatrix::kDown, r, down + static_cast<size_t>(r) * moe_intermediate_size);
  }
}

}  // namespace kt
