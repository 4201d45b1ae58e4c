#include "moe.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kt {
namespace {

constexpr int kMaxTokens = 4096;  // tokens per pass: bounds scratch, and gives an expert of 64 about 512 rows at top-8
constexpr int kMaxSegmentRows = 512;  // rows of one expert computed together (csrc/README.md, "Blocking")
constexpr int kGroupRows = 512;       // rows between two barriers

void finish_gate_up(const StripSink& sink, const EpilogueArgs& rows, int strip, EpilogueArgs& args) {
  args.h = rows.h + strip * kTileCols;
  if (rows.scale_b) args.scale_b = rows.scale_b + strip * kStripCols;
  (sink.arithmetic == Arithmetic::kInt8 ? sink.kernels->silu_mul_s32 : sink.kernels->silu_mul_f32)(args);
}

void finish_down(const StripSink& sink, const EpilogueArgs& rows, int strip, EpilogueArgs& args) {
  args.out = static_cast<float*>(rows.out) + strip * kStripCols;
  args.cols = std::min(kStripCols, rows.cols - strip * kStripCols);
  if (rows.scale_b) args.scale_b = rows.scale_b + strip * kStripCols;
  (sink.arithmetic == Arithmetic::kInt8 ? sink.kernels->add_weighted_s32 : sink.kernels->add_weighted_f32)(args);
}

// The output rows about to be added to: long since out of the caches when many tokens go by.
void prefetch_down(const StripSink& sink, int first_row, int rows, int begin, int end) {
  const size_t bytes =
      static_cast<size_t>(std::min(end * kStripCols, sink.args.cols) - begin * kStripCols) * sizeof(float);
  for (int r = first_row; r < first_row + rows; ++r) {
    const char* at = reinterpret_cast<const char*>(static_cast<const float*>(sink.args.out) +
                                                   sink.args.token[r] * sink.args.out_stride + begin * kStripCols);
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 1);
  }
}

}  // namespace

// Rows of one expert that are computed together. Rows are numbered in plan order: [row, row + rows).
struct ExpertLayer::Segment {
  int expert;
  int row;
  int rows;
  Arithmetic arithmetic;
  bool tiled;
  bool gathered;  // rows were copied together; else they are read in place from the stage
  Tiling gate_up_tiling;
  Tiling down_tiling;
  size_t input_offset;   // of this segment in the engine's tiles buffer
  size_t hidden_offset;  // and in hidden_rows
};

struct ExpertLayer::Plan {
  std::vector<int32_t> token;  // per plan row
  std::vector<float> weight;
  std::vector<float> scale;  // of the staged int8 row; filled once rows are staged
  std::vector<int32_t> sum;
  std::vector<float> hidden_scale;
  std::vector<int32_t> hidden_sum;
  std::vector<int32_t> segment_of_row;
  std::vector<Segment> segments;
  std::vector<int> group_ends;  // indices into segments
  std::vector<uint8_t> token_used;
  StageNeeds needs;
  size_t input_bytes = 0;  // largest group
  size_t hidden_bytes = 0;
  int hidden_rows = 0;
  int largest_segment = 0;
  size_t weight_bytes = 0;
};

// Counters of the three kinds of phase; a barrier lies between resetting and using one.
// Plan entries of a row are written by one worker and read by others behind a barrier.
struct GroupSync {
  Barrier barrier;
  UnitCounter rows, gate_up, hidden, down;
  int workers;
};

ExpertLayer::ExpertLayer(std::shared_ptr<Engine> engine, int hidden_size, int moe_intermediate_size,
                         std::vector<ExpertBlob> experts)
    : engine_(std::move(engine)), hidden_size_(hidden_size), intermediate_(moe_intermediate_size) {
  if (experts.empty()) throw std::invalid_argument("an expert layer needs at least one expert");
  for (const ExpertBlob& blob : experts) {
    const ExpertShape shape(blob.format, hidden_size, moe_intermediate_size);
    if (reinterpret_cast<uintptr_t>(blob.data) % 64 != 0)
      throw std::invalid_argument("expert blobs must be 64-byte aligned");
    const auto scales = [&](const StripShape& strips, size_t offset) {
      return strips.has_scales() ? reinterpret_cast<const float*>(blob.data + offset) : nullptr;
    };
    experts_.push_back({{shape.gate_up, blob.data, scales(shape.gate_up, shape.gate_up_scales_offset())},
                        {shape.down, blob.data + shape.down_offset(), scales(shape.down, shape.down_scales_offset())}});
  }
}

void ExpertLayer::check_ids(const Routing& routing, int tokens) const {
  for (int64_t i = 0; i < static_cast<int64_t>(tokens) * routing.k; ++i) {
    if (routing.ids[i] < -1 || routing.ids[i] >= num_experts()) {
      throw std::invalid_argument("expert id " + std::to_string(routing.ids[i]) + " of token " +
                                  std::to_string(i / routing.k) + " is not in [-1, " + std::to_string(num_experts()) +
                                  ")");
    }
  }
}

// Sorts (token, rank) pairs by expert, cuts long experts into segments and segments into groups.
ExpertLayer::Plan ExpertLayer::make_plan(const Input& x, const Routing& routing) const {
  Plan plan;
  const KernelTable& kernels = engine_->kernels();
  const int64_t pairs = static_cast<int64_t>(x.rows) * routing.k;
  std::vector<int> begin(experts_.size() + 1, 0);
  plan.token_used.assign(static_cast<size_t>(x.rows), 0);
  for (int64_t i = 0; i < pairs; ++i) {
    if (routing.ids[i] < 0) continue;
    ++begin[routing.ids[i] + 1];
    plan.token_used[i / routing.k] = 1;
  }
  for (size_t e = 0; e < experts_.size(); ++e) begin[e + 1] += begin[e];
  const size_t rows = static_cast<size_t>(begin.back());
  plan.token.resize(rows);
  plan.weight.resize(rows);
  plan.scale.resize(rows);
  plan.sum.resize(rows);
  plan.segment_of_row.resize(rows);
  std::vector<int> at(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < pairs; ++i) {
    if (routing.ids[i] < 0) continue;
    const int row = at[routing.ids[i]]++;
    plan.token[row] = static_cast<int32_t>(i / routing.k);
    plan.weight[row] = routing.weights[i];
  }
  int group_row = 0, group_rows = 0;
  size_t input_bytes = 0, hidden_bytes = 0;
  const auto close_group = [&] {
    if (group_rows == 0) return;
    plan.group_ends.push_back(static_cast<int>(plan.segments.size()));
    plan.input_bytes = std::max(plan.input_bytes, input_bytes);
    plan.hidden_bytes = std::max(plan.hidden_bytes, hidden_bytes);
    plan.hidden_rows = std::max(plan.hidden_rows, group_rows);
    group_row += group_rows;
    group_rows = 0;
    input_bytes = hidden_bytes = 0;
  };
  for (int e = 0; e < num_experts(); ++e) {
    const int total = begin[e + 1] - begin[e];
    if (total == 0) continue;
    const Expert& expert = experts_[e];
    plan.weight_bytes += expert.gate_up.shape.bytes() + expert.down.shape.bytes();
    const int pieces = (total + kMaxSegmentRows - 1) / kMaxSegmentRows;
    for (int piece = 0; piece < pieces; ++piece) {
      Segment s = {};
      s.expert = e;
      s.row = begin[e] + static_cast<int>(static_cast<int64_t>(total) * piece / pieces);
      s.rows = begin[e] + static_cast<int>(static_cast<int64_t>(total) * (piece + 1) / pieces) - s.row;
      if (group_rows + s.rows > kGroupRows) close_group();
      const FormatInfo& info = *expert.gate_up.shape.info;
      s.arithmetic = arithmetic_for(kernels, info, x.is_bf16, s.rows);
      s.tiled = uses_tiles(kernels, s.arithmetic, s.rows);
      s.gathered = s.tiled || s.rows > 2;  // two rows are two tokens at some distance: a stride
      s.gate_up_tiling = Tiling(s.rows, expert.gate_up.shape.k_steps());
      s.down_tiling = Tiling(s.rows, expert.down.shape.k_steps());
      s.input_offset = input_bytes;
      s.hidden_offset = hidden_bytes;
      if (s.gathered) {
        input_bytes += s.tiled ? s.gate_up_tiling.bytes() : s.rows * stage_stride(s.arithmetic, hidden_size_);
      }
      hidden_bytes += s.tiled ? s.down_tiling.bytes() : s.rows * stage_stride(s.arithmetic, intermediate_);
      plan.needs.int8 |= s.arithmetic == Arithmetic::kInt8;
      plan.needs.bf16 |= s.arithmetic == Arithmetic::kBf16;
      plan.needs.f32 |= s.arithmetic == Arithmetic::kFloat;
      plan.largest_segment = std::max(plan.largest_segment, s.rows);
      std::fill_n(plan.segment_of_row.begin() + s.row, s.rows, static_cast<int32_t>(plan.segments.size()));
      plan.segments.push_back(s);
      group_rows += s.rows;
    }
  }
  close_group();
  plan.hidden_scale.resize(static_cast<size_t>(plan.hidden_rows));
  plan.hidden_sum.resize(static_cast<size_t>(plan.hidden_rows));
  return plan;
}

void ExpertLayer::forward(const Input& x, const Routing& routing, float* out) {
  check_ids(routing, x.rows);
  std::lock_guard<std::mutex> busy(engine_->busy());
  for (int t = 0; t < x.rows; t += kMaxTokens) {
    const Input part = {x.row(t), x.is_bf16, std::min(kMaxTokens, x.rows - t), x.cols};
    const Routing part_routing = {routing.ids + static_cast<int64_t>(t) * routing.k,
                                  routing.weights + static_cast<int64_t>(t) * routing.k, routing.k};
    forward_chunk(part, part_routing, out + static_cast<size_t>(t) * hidden_size_);
  }
}

void ExpertLayer::forward_chunk(const Input& x, const Routing& routing, float* out) {
  Engine& engine = *engine_;
  Plan plan = make_plan(x, routing);
  if (plan.segments.empty()) {  // no token has an expert
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(x.rows) * hidden_size_);
    return;
  }
  const int workers = engine.workers_for(plan.weight_bytes, plan.largest_segment);
  reserve_stage(engine.stage, plan.needs, x.rows, hidden_size_);
  engine.tiles.reserve(plan.input_bytes);
  engine.hidden.reserve(plan.hidden_rows * hidden_row_floats() * sizeof(float));
  engine.hidden_rows.reserve(plan.hidden_bytes);
  for (int w = 0; w < workers; ++w) {
    engine.gemm_scratch(w).row.reserve(f32_stride(intermediate_));
    for (const Expert& expert : experts_) {
      reserve_gemm_scratch(engine.gemm_scratch(w), expert.gate_up.shape, plan.largest_segment, 16);
      reserve_gemm_scratch(engine.gemm_scratch(w), expert.down.shape, plan.largest_segment, 16);
    }
  }
  GroupSync sync{Barrier(workers), {}, {}, {}, {}, workers};
  UnitCounter tokens;
  const auto task = [&](int worker) {
    const KernelTable& kernels = engine.kernels();
    constexpr int kTokensPerUnit = 8;
    for (int t = tokens.take() * kTokensPerUnit; t < x.rows; t = tokens.take() * kTokensPerUnit) {
      for (int r = t; r < std::min(t + kTokensPerUnit, x.rows); ++r) {
        std::memset(out + static_cast<size_t>(r) * hidden_size_, 0, sizeof(float) * hidden_size_);
        if (plan.token_used[r]) stage_row(kernels, x, r, plan.needs, engine.stage, r);
      }
    }
    sync.barrier.wait();
    int first = 0;
    for (int last : plan.group_ends) {
      run_group(plan, first, last, worker, sync, out);
      first = last;
    }
    if (kernels.tile_release) kernels.tile_release();
  };
  engine.pool().run(workers, task);
}

void ExpertLayer::run_group(Plan& plan, int first, int last, int worker, GroupSync& sync, float* out) {
  Engine& engine = *engine_;
  const KernelTable& kernels = engine.kernels();
  GemmScratch& scratch = engine.gemm_scratch(worker);
  const int row_begin = plan.segments[first].row;
  const int row_end = plan.segments[last - 1].row + plan.segments[last - 1].rows;
  constexpr int kRowsPerUnit = 4;

  // Rows of the group, out of the stage and together.
  for (int u = sync.rows.take() * kRowsPerUnit; row_begin + u < row_end; u = sync.rows.take() * kRowsPerUnit) {
    for (int row = row_begin + u; row < std::min(row_begin + u + kRowsPerUnit, row_end); ++row) {
      const Segment& s = plan.segments[plan.segment_of_row[row]];
      const int token = plan.token[row];
      if (s.arithmetic == Arithmetic::kInt8) {
        plan.scale[row] = engine.stage.scale.as<float>()[token];
        plan.sum[row] = engine.stage.sum.as<int32_t>()[token];
      }
      if (!s.gathered) continue;
      const uint8_t* from = staged_row(engine.stage, s.arithmetic, hidden_size_, token);
      uint8_t* to = engine.tiles.bytes() + s.input_offset;
      const size_t stride = stage_stride(s.arithmetic, hidden_size_);
      if (s.tiled) {
        s.gate_up_tiling.scatter(from, row - s.row, to);
      } else {
        std::memcpy(to + (row - s.row) * stride, from, stride);
      }
    }
  }
  sync.barrier.wait();
  if (worker == 0) sync.hidden.reset(), sync.down.reset();

  // Gate and up, multiplied while they are hot.
  const size_t hidden_stride = hidden_row_floats();
  int largest = 1;
  for (int i = first; i < last; ++i) largest = std::max(largest, plan.segments[i].rows);
  const int gate_up_strips = experts_[0].gate_up.shape.strips();
  const int gate_up_unit = strips_per_unit(gate_up_strips * (last - first), sync.workers, largest);
  const int units_per_segment = (gate_up_strips + gate_up_unit - 1) / gate_up_unit;
  for (int u = sync.gate_up.take(); u < units_per_segment * (last - first); u = sync.gate_up.take()) {
    const Segment& s = plan.segments[first + u / units_per_segment];
    const int begin = u % units_per_segment * gate_up_unit, end = std::min(begin + gate_up_unit, gate_up_strips);
    const Weights& weights = experts_[s.expert].gate_up;
    Activations a = {engine.tiles.bytes() + s.input_offset,
                     stage_stride(s.arithmetic, hidden_size_),
                     s.rows,
                     plan.sum.data() + s.row,
                     s.tiled,
                     s.gate_up_tiling};
    if (!s.gathered) {
      a.data = staged_row(engine.stage, s.arithmetic, hidden_size_, plan.token[s.row]);
      if (s.rows == 2) a.row_stride *= static_cast<size_t>(plan.token[s.row + 1] - plan.token[s.row]);
    }
    StripSink sink = {finish_gate_up, nullptr, &kernels, s.arithmetic, {}};
    sink.args.rows = s.rows;
    sink.args.scale_a = weights.scales ? plan.scale.data() + s.row : nullptr;
    sink.args.scale_b = weights.scales;
    sink.args.h = engine.hidden.as<float>() + (s.row - row_begin) * hidden_stride;
    sink.args.h_stride = hidden_stride;
    gemm_strips(kernels, s.arithmetic, weights, begin, end, a, end < gate_up_strips ? weights.strip(end) : nullptr,
                scratch, sink);
  }
  sync.barrier.wait();
  if (worker == 0) sync.gate_up.reset(), sync.rows.reset();

  // The intermediate rows, quantised like the input was.
  for (int u = sync.hidden.take() * kRowsPerUnit; row_begin + u < row_end; u = sync.hidden.take() * kRowsPerUnit) {
    for (int row = row_begin + u; row < std::min(row_begin + u + kRowsPerUnit, row_end); ++row) {
      const Segment& s = plan.segments[plan.segment_of_row[row]];
      const int local = row - row_begin;
      float* h = engine.hidden.as<float>() + local * hidden_stride;
      std::memset(h + intermediate_, 0, (hidden_stride - intermediate_) * sizeof(float));
      const Input one = {h, false, 1, intermediate_};
      if (s.arithmetic == Arithmetic::kFloat) continue;
      const size_t stride = stage_stride(s.arithmetic, intermediate_);
      uint8_t* to = engine.hidden_rows.bytes() + s.hidden_offset;
      uint8_t* row_out = s.tiled ? scratch.row.bytes() : to + (row - s.row) * stride;
      convert_row(kernels, one, 0, s.arithmetic, row_out, &plan.hidden_scale[local], &plan.hidden_sum[local]);
      if (s.tiled) s.down_tiling.scatter(row_out, row - s.row, to);
    }
  }
  sync.barrier.wait();

  // Down: a worker owns a range of output columns for every expert of the group, in expert order, so that sums come
  // out the same however many workers there are.
  const int down_strips = experts_[0].down.shape.strips();
  const int down_unit = strips_per_unit(down_strips, sync.workers, largest);
  const int down_units = (down_strips + down_unit - 1) / down_unit;
  for (int u = sync.down.take(); u < down_units; u = sync.down.take()) {
    const int begin = u * down_unit, end = std::min(begin + down_unit, down_strips);
    for (int i = first; i < last; ++i) {
      const Segment& s = plan.segments[i];
      const Weights& weights = experts_[s.expert].down;
      const int local = s.row - row_begin;
      Activations a = {engine.hidden_rows.bytes() + s.hidden_offset,
                       stage_stride(s.arithmetic, intermediate_),
                       s.rows,
                       plan.hidden_sum.data() + local,
                       s.tiled,
                       s.down_tiling};
      if (s.arithmetic == Arithmetic::kFloat) {
        a.data = engine.hidden.bytes() + local * hidden_stride * sizeof(float);
        a.row_stride = hidden_stride * sizeof(float);
      }
      StripSink sink = {finish_down, prefetch_down, &kernels, s.arithmetic, {}};
      sink.args.rows = s.rows;
      sink.args.scale_a = weights.scales ? plan.hidden_scale.data() + local : nullptr;
      sink.args.scale_b = weights.scales;
      sink.args.token = plan.token.data() + s.row;
      sink.args.weight = plan.weight.data() + s.row;
      sink.args.out = out;
      sink.args.out_stride = static_cast<size_t>(hidden_size_);
      sink.args.cols = hidden_size_;
      const uint8_t* next = i + 1 < last        ? experts_[plan.segments[i + 1].expert].down.strip(begin)
                            : end < down_strips ? experts_[plan.segments[first].expert].down.strip(end)
                                                : nullptr;
      gemm_strips(kernels, s.arithmetic, weights, begin, end, a, next, scratch, sink);
    }
  }
  sync.barrier.wait();
}

}  // namespace kt
