#include "linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "block_pack.h"

namespace kt {
namespace {

constexpr int kMaxRows = 512;  // computed together, like a segment of an expert

void finish_store(const StripSink& sink, const EpilogueArgs& rows, int strip, EpilogueArgs& args) {
  args.cols = std::min(kStripCols, rows.cols - strip * kStripCols);
  if (rows.scale_b) args.scale_b = rows.scale_b + strip * kStripCols;
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

void PackedLinear::forward(const Input& x, void* out, bool out_is_bf16) {
  std::lock_guard<std::mutex> busy(engine_->busy());
  const size_t row_bytes = static_cast<size_t>(out_features()) * (out_is_bf16 ? 2 : 4);
  const int pieces = (x.rows + kMaxRows - 1) / kMaxRows;
  for (int piece = 0; piece < pieces; ++piece) {
    const int begin = static_cast<int>(static_cast<int64_t>(x.rows) * piece / pieces);
    const int end = static_cast<int>(static_cast<int64_t>(x.rows) * (piece + 1) / pieces);
    forward_rows({x.row(begin), x.is_bf16, end - begin, x.cols, x.may_round},
                 static_cast<uint8_t*>(out) + begin * row_bytes, out_is_bf16);
  }
}

void PackedLinear::forward_rows(const Input& x, uint8_t* out, bool out_is_bf16) {
  Engine& engine = *engine_;
  const KernelTable& kernels = engine.kernels();
  const StripShape& shape = weights_.shape;
  const Arithmetic arithmetic = arithmetic_for(kernels, *shape.info, x, x.rows);
  const bool tiled = uses_tiles(kernels, arithmetic, x.rows);
  const Tiling tiling(x.rows, shape.k_steps(), shape.info->is_expanded());
  StageNeeds needs;
  needs.add(arithmetic);
  reserve_stage(engine.stage, needs, x.rows, x.cols);
  if (tiled) engine.tiles.reserve(tiling.bytes());
  const int workers = engine.workers_for(shape.bytes(), x.rows);
  for (int w = 0; w < workers; ++w) reserve_gemm_scratch(engine.gemm_scratch(w), shape, x.rows);
  StripSink sink = {finish_store, nullptr, &kernels, arithmetic, {}, out_is_bf16};
  sink.args.rows = x.rows;
  sink.args.scale_a = arithmetic == Arithmetic::kInt8 ? engine.stage.scale.as<float>() : nullptr;
  sink.args.scale_b = weights_.scales;
  sink.args.out = out;
  sink.args.out_stride = static_cast<size_t>(shape.n);
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
    return strips.take(shape.strips(), shape.strips(), workers, least_strips(tiling), most_strips(x.rows));
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
      gemm_strips(kernels, arithmetic, weights_, run.begin, run.end, a,
                  run.end < shape.strips() ? weights_.strip(run.end) : nullptr, engine.gemm_scratch(worker), sink);
    }
    if (kernels.tile_release) kernels.tile_release();
  });
}

}  // namespace kt
