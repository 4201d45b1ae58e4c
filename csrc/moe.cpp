#include "moe.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kt {
namespace {

constexpr int kMaxTokens = 4096;  // tokens per pass: bounds scratch, and gives an expert of 64 about 512 rows at top-8
constexpr int kMaxSegmentRows = 640;  // rows of one expert computed together (csrc/README.md, "Blocking")
constexpr int kGroupRows = 1280;      // rows between two barriers

void finish_gate_up(const StripSink& sink, const EpilogueArgs& rows, int strip, EpilogueArgs& args) {
  args.h = rows.h + strip * kTileCols;
  if (rows.scale_b) args.scale_b = rows.scale_b + strip * kStripCols;
  if (sink.gate) {
    const float* bias = sink.bias ? sink.bias + strip * kStripCols : nullptr;
    return gate_mul(args, sink.arithmetic == Arithmetic::kInt8, bias, *sink.gate);
  }
  (sink.arithmetic == Arithmetic::kInt8 ? sink.kernels->silu_mul_s32 : sink.kernels->silu_mul_f32)(args);
}

void finish_down(const StripSink& sink, const EpilogueArgs& rows, int strip, EpilogueArgs& args) {
  args.out = static_cast<float*>(rows.out) + strip * kStripCols;
  args.cols = std::min(kStripCols, rows.cols - strip * kStripCols);
  if (rows.scale_b) args.scale_b = rows.scale_b + strip * kStripCols;
  (sink.arithmetic == Arithmetic::kInt8 ? sink.kernels->add_weighted_s32 : sink.kernels->add_weighted_f32)(args);
  if (sink.bias) add_weighted_bias(args, sink.bias + strip * kStripCols);
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
  std::vector<uint8_t> first;  // whether no earlier row is of the same token
  std::vector<float> scale;    // of the staged int8 row; filled once rows are staged
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
  UnitCounter rows, hidden;
  NodeStrips gate_up, down;
  int workers;
};

ExpertLayer::ExpertLayer(std::shared_ptr<Engine> engine, int hidden_size, int moe_intermediate_size,
                         std::vector<ExpertBlob> experts)
    : engine_(std::move(engine)), hidden_size_(hidden_size), intermediate_(moe_intermediate_size) {
  if (experts.empty()) throw std::invalid_argument("an expert layer needs at least one expert");
  for (const ExpertBlob& blob : experts) {
    if (reinterpret_cast<uintptr_t>(blob.data) % 64 != 0)
      throw std::invalid_argument("expert blobs must be 64-byte aligned");
    experts_.push_back(expert_at(blob, hidden_size, moe_intermediate_size));
  }
  if (engine_->numa() == NumaMode::kReplicate && engine_->nodes() > 1) replicate(experts);
}

ExpertLayer::Expert ExpertLayer::expert_at(const ExpertBlob& blob, int hidden_size, int moe_intermediate_size) {
  const ExpertShape shape(blob.format, hidden_size, moe_intermediate_size);
  const auto scales = [&](const StripShape& strips, size_t offset) {
    return strips.has_scales() ? reinterpret_cast<const float*>(blob.data + offset) : nullptr;
  };
  return {{shape.gate_up, blob.data, scales(shape.gate_up, shape.gate_up_scales_offset())},
          {shape.down, blob.data + shape.down_offset(), scales(shape.down, shape.down_scales_offset())}};
}

void ExpertLayer::set_biases(const float* gate, const float* up, const float* down) {
  const auto inner = static_cast<size_t>(intermediate_), hidden = static_cast<size_t>(hidden_size_);
  const size_t gate_up_width = gate_up_bias_width(), down_width = down_bias_width();
  std::vector<float> both(experts_.size() * gate_up_width), last(experts_.size() * down_width);
  for (size_t e = 0; e < experts_.size(); ++e) {
    for (size_t i = 0; i < inner; ++i) {
      float* strip = both.data() + e * gate_up_width + i / kTileCols * kStripCols;
      strip[i % kTileCols] = gate[e * inner + i];
      strip[kTileCols + i % kTileCols] = up[e * inner + i];
    }
    std::memcpy(last.data() + e * down_width, down + e * hidden, hidden * sizeof(float));
  }
  std::lock_guard<std::mutex> busy(engine_->busy());
  gate_up_bias_ = std::move(both);
  down_bias_ = std::move(last);
}

void ExpertLayer::set_gate(const GateShape& gate) {
  std::lock_guard<std::mutex> busy(engine_->busy());
  gate_ = gate;
  is_plain_gate_ = false;
}

// A copy of all blobs on every node, written by threads of that node so that its memory is taken.
void ExpertLayer::replicate(const std::vector<ExpertBlob>& experts) {
  std::vector<size_t> offsets = {0};
  for (const ExpertBlob& blob : experts)
    offsets.push_back(offsets.back() + ExpertShape(blob.format, hidden_size_, intermediate_).blob_bytes());
  copies_.resize(static_cast<size_t>(engine_->nodes()));
  node_experts_.resize(copies_.size());
  for (size_t node = 0; node < copies_.size(); ++node) {
    copies_[node].reserve(offsets.back());
    for (size_t e = 0; e < experts.size(); ++e)
      node_experts_[node].push_back(
          expert_at({experts[e].format, copies_[node].bytes() + offsets[e]}, hidden_size_, intermediate_));
  }
  engine_->pool().run(engine_->threads(), [&](int worker) {
    const int node = engine_->node_of(worker), beside = engine_->workers_on(node);
    for (size_t e = static_cast<size_t>(worker / engine_->nodes()); e < experts.size(); e += beside)
      std::memcpy(copies_[node].bytes() + offsets[e], experts[e].data, offsets[e + 1] - offsets[e]);
  });
}

std::vector<size_t> ExpertLayer::node_bytes() const {
  std::vector<size_t> bytes(static_cast<size_t>(engine_->nodes()));
  for (size_t node = 0; node < bytes.size(); ++node) {
    for (const Expert& expert : experts_) {
      for (const StripShape* shape : {&expert.gate_up.shape, &expert.down.shape}) {
        const StripCounter::Run share = engine_->share(shape->strips(), static_cast<int>(node));
        const int strips = node_experts_.empty() ? share.end - share.begin : shape->strips();
        bytes[node] += strips * shape->strip_bytes();
      }
    }
  }
  return bytes;
}

void ExpertLayer::make_resident(int expert) {
  const auto share_of = [&](int node) {
    for (const Weights* weights : {&experts_[expert].gate_up, &experts_[expert].down}) {
      const StripCounter::Run share = engine_->share(weights->shape.strips(), node);
      kt::make_resident(weights->strip(share.begin), (share.end - share.begin) * weights->shape.strip_bytes(),
                        engine_->node(node));
      if (!weights->scales) continue;
      kt::make_resident(weights->scales + share.begin * kStripCols,
                        (share.end - share.begin) * kStripCols * sizeof(float), engine_->node(node));
    }
  };
  if (engine_->nodes() == 1) return share_of(0);
  std::lock_guard<std::mutex> busy(engine_->busy());
  engine_->pool().run(engine_->threads(), [&](int worker) {
    if (worker < engine_->nodes()) share_of(engine_->node_of(worker));
  });
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
  plan.first.resize(rows);
  plan.scale.resize(rows);
  plan.sum.resize(rows);
  plan.segment_of_row.resize(rows);
  std::vector<int> at(begin.begin(), begin.end() - 1);
  for (int t = 0; t < x.rows; ++t) {
    int first = static_cast<int>(rows);
    for (int64_t i = static_cast<int64_t>(t) * routing.k; i < static_cast<int64_t>(t + 1) * routing.k; ++i) {
      if (routing.ids[i] < 0) continue;
      const int row = at[routing.ids[i]]++;
      plan.token[row] = t;
      plan.weight[row] = routing.weights[i];
      first = std::min(first, row);
    }
    if (first < static_cast<int>(rows)) plan.first[first] = 1;
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
      s.arithmetic = arithmetic_for(kernels, info, x, s.rows);
      s.tiled = uses_tiles(kernels, s.arithmetic, s.rows);
      s.gathered = s.tiled || s.rows > 2;  // two rows are two tokens at some distance: a stride
      s.gate_up_tiling = Tiling(s.rows, expert.gate_up.shape);
      s.down_tiling = Tiling(s.rows, expert.down.shape);
      s.input_offset = input_bytes;
      s.hidden_offset = hidden_bytes;
      if (s.gathered) {
        input_bytes += s.tiled ? s.gate_up_tiling.bytes() : s.rows * stage_stride(s.arithmetic, hidden_size_);
      }
      hidden_bytes += s.tiled ? s.down_tiling.bytes() : s.rows * stage_stride(s.arithmetic, intermediate_);
      plan.needs.add(s.arithmetic);
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
    const Input part = {x.row(t), x.is_bf16, std::min(kMaxTokens, x.rows - t), x.cols, x.may_round};
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
    engine.gemm_scratch(w).rows.reserve(kGatherRows * widest_stride(intermediate_));
    for (const Expert& expert : experts_) {
      reserve_gemm_scratch(engine.gemm_scratch(w), expert.gate_up.shape, plan.largest_segment);
      reserve_gemm_scratch(engine.gemm_scratch(w), expert.down.shape, plan.largest_segment);
    }
  }
  GroupSync sync{Barrier(workers), {}, {}, {}, {}, workers};
  UnitCounter tokens;
  const auto task = [&](int worker) {
    const KernelTable& kernels = engine.kernels();
    constexpr int kTokensPerUnit = 8;
    for (int t = tokens.take() * kTokensPerUnit; t < x.rows; t = tokens.take() * kTokensPerUnit) {
      for (int r = t; r < std::min(t + kTokensPerUnit, x.rows); ++r) {
        if (plan.token_used[r]) {
          stage_row(kernels, x, r, plan.needs, engine.stage, r);
        } else {
          std::memset(out + static_cast<size_t>(r) * hidden_size_, 0, sizeof(float) * hidden_size_);
        }
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

// Plan rows [begin, end) of a group from the stage to where their segments want them.
void ExpertLayer::gather_rows(Plan& plan, int begin, int end) {
  Engine& engine = *engine_;
  const uint8_t* from[kGatherRows];
  for (int row = begin; row < end;) {
    const Segment& s = plan.segments[plan.segment_of_row[row]];
    const int start = row, stop = std::min(end, s.row + s.rows);
    for (; row < stop; ++row) {
      const int token = plan.token[row];
      if (s.arithmetic == Arithmetic::kInt8) {
        plan.scale[row] = engine.stage.scale.as<float>()[token];
        plan.sum[row] = engine.stage.sum.as<int32_t>()[token];
      }
      from[row - start] = staged_row(engine.stage, s.arithmetic, hidden_size_, token);
    }
    uint8_t* to = engine.tiles.bytes() + s.input_offset;
    if (s.tiled) {
      s.gate_up_tiling.scatter(from, start - s.row, stop - start, to);
    } else if (s.gathered) {
      const size_t stride = stage_stride(s.arithmetic, hidden_size_);
      for (int r = start; r < stop; ++r) std::memcpy(to + (r - s.row) * stride, from[r - start], stride);
    }
  }
}

// Intermediate rows [begin, end), quantised as the down matrices of their segments want them. `group`: the group's first row.
void ExpertLayer::convert_hidden(Plan& plan, int group, int begin, int end, GemmScratch& scratch) {
  Engine& engine = *engine_;
  const size_t hidden_stride = hidden_row_floats();
  for (int row = begin; row < end;) {
    const Segment& s = plan.segments[plan.segment_of_row[row]];
    const size_t stride = stage_stride(s.arithmetic, intermediate_);
    uint8_t* to = engine.hidden_rows.bytes() + s.hidden_offset;
    const uint8_t* converted[kGatherRows];
    const int start = row, stop = std::min(end, s.row + s.rows);
    for (; row < stop; ++row) {
      const int local = row - group;
      float* h = engine.hidden.as<float>() + local * hidden_stride;
      std::memset(h + intermediate_, 0, (hidden_stride - intermediate_) * sizeof(float));
      if (s.arithmetic == Arithmetic::kFloat) continue;  // used as it is
      uint8_t* out = s.tiled ? scratch.rows.bytes() + (row - start) * stride : to + (row - s.row) * stride;
      convert_row(engine.kernels(), {h, false, 1, intermediate_}, 0, s.arithmetic, out, &plan.hidden_scale[local],
                  &plan.hidden_sum[local]);
      converted[row - start] = out;
    }
    if (s.tiled) s.down_tiling.scatter(converted, start - s.row, stop - start, to);
  }
}

void ExpertLayer::run_group(Plan& plan, int first, int last, int worker, GroupSync& sync, float* out) {
  Engine& engine = *engine_;
  const KernelTable& kernels = engine.kernels();
  GemmScratch& scratch = engine.gemm_scratch(worker);
  const int row_begin = plan.segments[first].row;
  const int row_end = plan.segments[last - 1].row + plan.segments[last - 1].rows;
  // Rows of the group, out of the stage and together.
  const auto next_rows = [&](UnitCounter& counter) { return row_begin + counter.take() * kGatherRows; };
  for (int row = next_rows(sync.rows); row < row_end; row = next_rows(sync.rows)) {
    gather_rows(plan, row, std::min(row + kGatherRows, row_end));
  }
  sync.barrier.wait();
  if (worker == 0) sync.hidden.reset(), sync.down.reset();

  // Gate and up, multiplied while they are hot.
  const size_t hidden_stride = hidden_row_floats();
  int largest = 1;
  for (int i = first; i < last; ++i) largest = std::max(largest, plan.segments[i].rows);
  const std::vector<Expert>& experts = experts_for(worker);
  const int gate_up_strips = experts[0].gate_up.shape.strips();
  const auto next_gate_up = [&] {
    return sync.gate_up.take(engine, worker, gate_up_strips, last - first, sync.workers,
                             least_strips(plan.segments[first].gate_up_tiling), most_strips(largest));
  };
  for (NodeStrips::Run run = next_gate_up(); run.begin < run.end; run = next_gate_up()) {
    const Segment& s = plan.segments[first + run.matrix];
    const int begin = run.begin, end = run.end;
    const Weights& weights = experts[s.expert].gate_up;
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
    sink.args.scale_a = s.arithmetic == Arithmetic::kInt8 ? plan.scale.data() + s.row : nullptr;
    sink.args.scale_b = weights.scales;
    sink.args.h = engine.hidden.as<float>() + (s.row - row_begin) * hidden_stride;
    sink.args.h_stride = hidden_stride;
    if (!is_plain_gate_ || !gate_up_bias_.empty()) sink.gate = &gate_;
    if (!gate_up_bias_.empty()) sink.bias = gate_up_bias_.data() + s.expert * gate_up_bias_width();
    gemm_strips(kernels, s.arithmetic, {&weights, nullptr, begin, end}, a,
                end < gate_up_strips ? weights.strip(end) : nullptr, scratch, sink);
  }
  sync.barrier.wait();
  if (worker == 0) sync.gate_up.reset(), sync.rows.reset();

  // The intermediate rows, quantised like the input was.
  for (int row = next_rows(sync.hidden); row < row_end; row = next_rows(sync.hidden)) {
    convert_hidden(plan, row_begin, row, std::min(row + kGatherRows, row_end), scratch);
  }
  sync.barrier.wait();

  // Down: a worker owns a range of output columns for every expert of the group, in expert order, so that sums come
  // out the same however many workers there are.
  const int down_strips = experts[0].down.shape.strips();
  const auto next_down = [&] {
    return sync.down.take(engine, worker, down_strips, 1, sync.workers, least_strips(plan.segments[first].down_tiling),
                          most_strips(largest));
  };
  for (NodeStrips::Run run = next_down(); run.begin < run.end; run = next_down()) {
    const int begin = run.begin, end = run.end;
    for (int i = first; i < last; ++i) {
      const Segment& s = plan.segments[i];
      const Weights& weights = experts[s.expert].down;
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
      StripSink sink = {finish_down, prefetch_added, &kernels, s.arithmetic, {}};
      sink.args.rows = s.rows;
      sink.args.scale_a = s.arithmetic == Arithmetic::kInt8 ? plan.hidden_scale.data() + local : nullptr;
      sink.args.scale_b = weights.scales;
      sink.args.token = plan.token.data() + s.row;
      sink.args.weight = plan.weight.data() + s.row;
      sink.args.first = plan.first.data() + s.row;
      sink.args.out = out;
      sink.args.out_stride = static_cast<size_t>(hidden_size_);
      sink.args.cols = hidden_size_;
      if (!down_bias_.empty()) sink.bias = down_bias_.data() + s.expert * down_bias_width();
      const uint8_t* next = i + 1 < last        ? experts[plan.segments[i + 1].expert].down.strip(begin)
                            : end < down_strips ? experts[plan.segments[first].expert].down.strip(end)
                                                : nullptr;
      gemm_strips(kernels, s.arithmetic, {&weights, nullptr, begin, end}, a, next, scratch, sink);
    }
  }
  sync.barrier.wait();
}

}  // namespace kt
