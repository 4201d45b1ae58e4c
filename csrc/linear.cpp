#include "linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "block_pack.h"

namespace kt {
namespace {

constexpr int kMaxRows = 512;  // computed together, like a segment of an expert
// An output of so many bytes is stored past the caches: queries of 512 tokens of DeepSeek-V3 (50 MB), 11.1 -> 8.4 ms with
// the product that makes them; reading them afterwards takes no longer.
constexpr size_t kStreamedBytes = 8 << 20;

// What add_weighted takes to add row r to row r.
struct InPlace {
  int32_t token[kMaxRows];
  float weight[kMaxRows];
  uint8_t first[kMaxRows] = {};

  InPlace() {
    for (int r = 0; r < kMaxRows; ++r) token[r] = r, weight[r] = 1.0f;
  }
};

const InPlace& in_place() {
  static const InPlace rows;
  return rows;
}

void at_strip(const EpilogueArgs& rows, int strip, EpilogueArgs& args) {
  args.cols = std::min(kStripCols, rows.cols - strip * kStripCols);
  if (rows.scale_b) args.scale_b = rows.scale_b + strip * kStripCols;
}

void finish_store(const StripSink& sink, const EpilogueArgs& rows, int strip, EpilogueArgs& args) {
  at_strip(rows, strip, args);
  const KernelTable& k = *sink.kernels;
  const bool exact = sink.arithmetic == Arithmetic::kInt8;
  if (sink.out_is_bf16) {
    args.out = static_cast<uint16_t*>(rows.out) + strip * kStripCols;
    (exact ? k.store_bf16_s32 : k.store_bf16_f32)(args);
  } else {
    args.out = static_cast<float*>(rows.out) + strip * kStripCols;
    (exact ? k.store_f32_s32 : k.store_f32_f32)(args);
  }
}

void finish_add(const StripSink& sink, const EpilogueArgs& rows, int strip, EpilogueArgs& args) {
  at_strip(rows, strip, args);
  args.out = static_cast<float*>(rows.out) + strip * kStripCols;
  const KernelTable& k = *sink.kernels;
  (sink.arithmetic == Arithmetic::kInt8 ? k.add_weighted_s32 : k.add_weighted_f32)(args);
}

void finish_gated(const StripSink& sink, const EpilogueArgs& rows, int strip, EpilogueArgs& args) {
  args.h = rows.h + strip * kStripCols;
  if (rows.scale_b) args.scale_b = rows.scale_b + strip * kStripCols;
  if (rows.scale_b_up) args.scale_b_up = rows.scale_b_up + strip * kStripCols;
  const KernelTable& k = *sink.kernels;
  (sink.arithmetic == Arithmetic::kInt8 ? k.silu_pair_s32 : k.silu_pair_f32)(args);
}

// part(begin, end) over the rows in pieces of at most kMaxRows, as equal as can be.
template <typename F>
void in_pieces(int rows, const F& part) {
  const int pieces = (rows + kMaxRows - 1) / kMaxRows;
  for (int piece = 0; piece < pieces; ++piece) {
    part(static_cast<int>(static_cast<int64_t>(rows) * piece / pieces),
         static_cast<int>(static_cast<int64_t>(rows) * (piece + 1) / pieces));
  }
}

Input rows_of(const Input& x, int begin, int end) {
  return {x.row(begin), x.is_bf16, end - begin, x.cols, x.may_round};
}

// The second half of a matrix's outputs.
Weights second_half(const Weights& weights) {
  Weights half = weights;
  half.shape.n = weights.shape.n / 2;
  half.strips = weights.strip(half.shape.strips());
  if (half.scales) half.scales += half.shape.n;
  return half;
}

}  // namespace

PackedLinear::PackedLinear(std::shared_ptr<Engine> engine, Format format, const CodeView& codes, const float* row_scale)
    : engine_(std::move(engine)), weights_{{codes.n, codes.k, &format_info(format)}, nullptr, nullptr} {
  reserve();
  fill_strips([&](uint8_t* strip, int col, int row, std::vector<float>&) {
    place_row(*weights_.shape.info, codes, row, strip, col);
  });
  if (row_scale) std::memcpy(scales_.bytes(), row_scale, static_cast<size_t>(codes.n) * sizeof(float));
}

PackedLinear::PackedLinear(std::shared_ptr<Engine> engine, Format format, const uint8_t* rows, int n, int k)
    : engine_(std::move(engine)), weights_{{n, k, &format_info(format)}, nullptr, nullptr} {
  const FormatInfo& info = *weights_.shape.info;
  check_block_inputs(info, k);
  check_ggml_scales(info, rows, n, k);
  reserve();
  const size_t row_bytes = ggml_row_bytes(info, k);
  float* scales = scales_.as<float>();
  fill_strips([&](uint8_t* strip, int col, int row, std::vector<float>& values) {
    values.resize(static_cast<size_t>(k));
    scales[row] = place_ggml_row(info, rows + static_cast<size_t>(row) * row_bytes, k, strip, col, values.data());
  });
}

void PackedLinear::reserve() {
  const StripShape& shape = weights_.shape;
  strips_.reserve(shape.bytes());
  std::memset(strips_.bytes(), 0, shape.bytes());
  weights_.strips = strips_.bytes();
  if (!shape.has_scales()) return;
  scales_.reserve(ExpertShape::scales_bytes(shape));
  std::memset(scales_.bytes(), 0, ExpertShape::scales_bytes(shape));
  weights_.scales = scales_.as<float>();
}

template <typename Fill>
void PackedLinear::fill_strips(const Fill& fill) {
  const StripShape& shape = weights_.shape;
  UnitCounter units;
  engine_->pool().run(engine_->workers_for(shape.bytes(), 1), [&](int) {
    std::vector<float> values;
    for (int strip = units.take(); strip < shape.strips(); strip = units.take()) {
      uint8_t* at = strips_.bytes() + strip * shape.strip_bytes();
      const int cols = std::min(kStripCols, shape.n - strip * kStripCols);
      for (int col = 0; col < cols; ++col) fill(at, col, strip * kStripCols + col, values);
    }
  });
}

size_t PackedLinear::nbytes() const {
  const StripShape& shape = weights_.shape;
  return shape.bytes() + ExpertShape::scales_bytes(shape);
}

void PackedLinear::forward(const Input& x, const LinearOut& out) {
  std::lock_guard<std::mutex> busy(engine_->busy());
  in_pieces(x.rows, [&](int begin, int end) {
    StripSink sink = {};
    sink.finish = out.adds ? finish_add : finish_store;
    sink.prefetch = out.adds ? prefetch_added : nullptr;
    sink.out_is_bf16 = out.is_bf16;
    sink.args.out = static_cast<char*>(out.data) + static_cast<size_t>(begin) * out.stride * (out.is_bf16 ? 2 : 4);
    sink.args.out_stride = out.stride;
    sink.args.past_caches = x.rows * out.stride * sizeof(float) >= kStreamedBytes;
    if (out.adds) {
      sink.args.token = in_place().token;
      sink.args.weight = in_place().weight;
      sink.args.first = in_place().first;
    }
    multiply(*engine_, weights_, nullptr, rows_of(x, begin, end), sink);
  });
}

bool PackedLinear::can_gate(const PackedLinear& gate, const PackedLinear* up) {
  const int inner = up ? gate.out_features() : gate.out_features() / 2;
  if (up && (up->weights_.shape.info != gate.weights_.shape.info || up->out_features() != inner)) return false;
  return inner % kStripCols == 0;
}

void PackedLinear::forward_gated(const PackedLinear& gate, const PackedLinear* up, const Input& x, float* out) {
  std::lock_guard<std::mutex> busy(gate.engine_->busy());
  Weights first = gate.weights_;
  const Weights second = up ? up->weights_ : second_half(first);
  first.shape.n = second.shape.n;
  const auto inner = static_cast<size_t>(first.shape.n);
  in_pieces(x.rows, [&](int begin, int end) {
    StripSink sink = {};
    sink.finish = finish_gated;
    sink.args.scale_b_up = second.scales;
    sink.args.h = out + static_cast<size_t>(begin) * inner;
    sink.args.h_stride = inner;
    sink.args.past_caches = x.rows * inner * sizeof(float) >= kStreamedBytes;
    multiply(*gate.engine_, first, &second, rows_of(x, begin, end), sink);
  });
}

void PackedLinear::multiply(Engine& engine, const Weights& first, const Weights* second, const Input& x,
                            StripSink sink) {
  const KernelTable& kernels = engine.kernels();
  const StripShape& shape = first.shape;
  const int matrices = second ? 2 : 1;
  const Arithmetic arithmetic = arithmetic_for(kernels, *shape.info, x, x.rows);
  const bool tiled = uses_tiles(kernels, arithmetic, x.rows);
  const Tiling tiling(x.rows, shape);
  StageNeeds needs;
  needs.add(arithmetic);
  reserve_stage(engine.stage, needs, x.rows, x.cols);
  if (tiled) engine.tiles.reserve(tiling.bytes());
  const int workers = engine.workers_for(matrices * shape.bytes(), x.rows);
  for (int w = 0; w < workers; ++w) reserve_gemm_scratch(engine.gemm_scratch(w), shape, x.rows);
  sink.kernels = &kernels;
  sink.arithmetic = arithmetic;
  sink.args.rows = x.rows;
  sink.args.scale_a = arithmetic == Arithmetic::kInt8 ? engine.stage.scale.as<float>() : nullptr;
  sink.args.scale_b = first.scales;
  sink.args.cols = shape.n;
  const Activations a = {tiled ? engine.tiles.bytes() : staged_row(engine.stage, arithmetic, x.cols, 0),
                         stage_stride(arithmetic, x.cols),
                         x.rows,
                         engine.stage.sum.as<int32_t>(),
                         tiled,
                         tiling};
  UnitCounter rows;
  StripCounter strips;
  Barrier barrier(workers);
  const auto next_rows = [&] { return rows.take() * kGatherRows; };
  const auto next_strips = [&] {
    return strips.take(shape.strips(), shape.strips(), workers, std::max(1, least_strips(tiling) / matrices),
                       std::max(1, most_strips(x.rows) / matrices));
  };
  engine.pool().run(workers, [&](int worker) {
    const uint8_t* staged[kGatherRows];
    for (int row = next_rows(); row < x.rows; row = next_rows()) {
      const int stop = std::min(row + kGatherRows, x.rows);
      for (int r = row; r < stop; ++r) {
        stage_row(kernels, x, r, needs, engine.stage, r);
        staged[r - row] = staged_row(engine.stage, arithmetic, x.cols, r);
      }
      if (tiled) tiling.scatter(staged, row, stop - row, engine.tiles.bytes());
    }
    barrier.wait();
    for (StripCounter::Run run = next_strips(); run.begin < run.end; run = next_strips()) {
      gemm_strips(kernels, arithmetic, {&first, second, run.begin, run.end}, a,
                  run.end < shape.strips() ? first.strip(run.end) : nullptr, engine.gemm_scratch(worker), sink);
    }
    if (kernels.tile_release) kernels.tile_release();
  });
}

}  // namespace kt
