#include "gqa_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "row_math.h"

namespace kt {
namespace {

float* reserve_floats(Buffer& buffer, size_t count) {
  buffer.reserve(count * sizeof(float));
  return buffer.as<float>();
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("grouped-query attention: ") + what);
}

bool fits(const std::vector<float>& values, int size) {
  return values.empty() || values.size() == static_cast<size_t>(size);
}

void add(float* y, const std::vector<float>& bias, int from, int count) {
  if (!bias.empty()) add_scaled(y, bias.data() + from, 1.0f, static_cast<size_t>(count));
}

}  // namespace

// The chunks of all rows, and where their results lie: [chunk of a row][head], dim floats and one PartialSoftmax each.
struct GqaStep::Plan {
  struct Row {
    const float* query;
    int begin, end;    // keys seen
    int first, count;  // chunks of the cache
    int offset;        // chunks of the rows before
  };
  Row rows[kMaxStepRows];
  int chunks = 0;
  size_t keys = 0;
  const uint16_t* cache;
  float* parts = nullptr;
  PartialSoftmax* sums = nullptr;

  Plan(const GqaShape& shape, const Columns& query, int num_rows, const uint16_t* context, int start) : cache(context) {
    for (int r = 0; r < num_rows; ++r) {
      const int end = start + r + 1, begin = shape.window ? std::max(0, end - shape.window) : 0;
      const int first = begin / kPartKeys, count = (end - 1) / kPartKeys - first + 1;
      rows[r] = {query.row(static_cast<size_t>(r)), begin, end, first, count, chunks};
      chunks += count;
      keys += static_cast<size_t>(end - begin);
    }
  }
};

GqaStep::GqaStep(std::shared_ptr<Engine> engine, const GqaShape& shape, float softmax_scale, Norm norm,
                 std::vector<PackedLinear*> inputs, PackedLinear* out, GqaExtras extras)
    : engine_(std::move(engine)),
      shape_(shape),
      softmax_scale_(softmax_scale),
      has_tiles_(engine_->kernels().tile_bf16 != nullptr && shape.dim % 32 == 0),
      norm_(std::move(norm)),
      inputs_(std::move(inputs)),
      out_(out),
      extras_(std::move(extras)) {
  require(shape.heads % shape.kv_heads == 0, "key heads must divide the heads");
  require(shape.rope % 2 == 0 && shape.rope <= shape.dim, "the rotary part must be even and within a head");
  require(inputs_.size() == 1 || inputs_.size() == 3, "expected one input matrix or three");
  const int sizes[] = {shape.queries(), shape.keys(), shape.keys()};
  for (size_t i = 0; i < inputs_.size(); ++i) {
    require(inputs_[i]->in_features() == hidden_size(), "inputs of an input matrix");
    require(inputs_[i]->out_features() == (inputs_.size() == 1 ? shape.projected() : sizes[i]),
            "outputs of an input matrix");
  }
  require(out->in_features() == shape.queries() && out->out_features() == hidden_size(), "sizes of o_proj");
  for (const auto* head_norm : {&extras_.q_norm, &extras_.k_norm}) {
    require(!*head_norm || (*head_norm)->size() == shape.dim, "size of a head's norm");
  }
  require(fits(extras_.input_bias, shape.projected()), "size of the input bias");
  require(fits(extras_.out_bias, hidden_size()), "size of the output bias");
  require(fits(extras_.sinks, shape.heads), "number of sinks");
}

void GqaStep::forward(float* hidden, int rows, const float* rotations, uint16_t* cache, int start) {
  std::lock_guard<std::mutex> stepping(engine_->stepping());
  StepScratch& step = engine_->step;
  const auto count = static_cast<size_t>(rows), width = static_cast<size_t>(hidden_size());
  float* x = reserve_floats(step.normed, count * width);
  for (size_t r = 0; r < count; ++r) norm_.apply(hidden + r * width, x + r * width);
  const Projected projected = project(x, rows);
  for (int r = 0; r < rows; ++r) {
    const auto row = static_cast<size_t>(r);
    position(projected, r, rotations + row * static_cast<size_t>(shape_.rope),
             cache + (static_cast<size_t>(start) + row) * static_cast<size_t>(shape_.cached()));
  }
  float* attended = reserve_floats(step.heads, count * static_cast<size_t>(shape_.queries()));
  attend(projected.query, rows, cache, start, attended);
  float* out = reserve_floats(step.out, count * width);
  out_->forward(step_input(attended, rows, shape_.queries()), {out, width});
  for (size_t r = 0; r < count; ++r) {
    add(out + r * width, extras_.out_bias, 0, hidden_size());
    add_scaled(hidden + r * width, out + r * width, 1.0f, width);
  }
}

GqaStep::Projected GqaStep::project(const float* x, int rows) {
  const auto queries = static_cast<size_t>(shape_.queries()), keys = static_cast<size_t>(shape_.keys());
  const auto count = static_cast<size_t>(rows);
  float* all = reserve_floats(engine_->step.projected, count * static_cast<size_t>(shape_.projected()));
  float* at = all;
  for (PackedLinear* input : inputs_) {
    input->forward(step_input(x, rows, hidden_size()), {at, static_cast<size_t>(input->out_features())});
    at += count * static_cast<size_t>(input->out_features());
  }
  if (inputs_.size() == 3) {
    return {{all, queries}, {all + count * queries, keys}, {all + count * (queries + keys), keys}};
  }
  const size_t stride = queries + 2 * keys;
  return {{all, stride}, {all + queries, stride}, {all + queries + keys, stride}};
}

// Bias, norm and rotation of one row, and its row of the cache.
void GqaStep::position(const Projected& projected, int row, const float* rotation, uint16_t* cached) const {
  const auto r = static_cast<size_t>(row), keys = static_cast<size_t>(shape_.keys());
  float *query = projected.query.row(r), *key = projected.key.row(r), *value = projected.value.row(r);
  add(query, extras_.input_bias, 0, shape_.queries());
  add(key, extras_.input_bias, shape_.queries(), shape_.keys());
  add(value, extras_.input_bias, shape_.queries() + shape_.keys(), shape_.keys());
  turn_heads(query, shape_.heads, extras_.q_norm, rotation);
  turn_heads(key, shape_.kv_heads, extras_.k_norm, rotation);
  round_bf16(key, keys, cached);
  round_bf16(value, keys, cached + keys);
}

void GqaStep::turn_heads(float* data, int heads, const std::optional<Norm>& norm, const float* rotation) const {
  for (int h = 0; h < heads; ++h) {
    float* head = data + static_cast<size_t>(h) * static_cast<size_t>(shape_.dim);
    if (norm) norm->apply(head, head);
    rotate_pairs(head, rotation, static_cast<size_t>(shape_.rope) / 2);
  }
}

// Chunks of keys are attended to by themselves and joined, so that few key heads keep many threads busy at a long context.
void GqaStep::attend(const Columns& query, int rows, const uint16_t* cache, int start, float* out) {
  Plan plan(shape_, query, rows, cache, start);
  const size_t parts = static_cast<size_t>(plan.chunks) * static_cast<size_t>(shape_.heads);
  const auto dim = static_cast<size_t>(shape_.dim);
  plan.parts = reserve_floats(engine_->step.inner, parts * (dim + sizeof(PartialSoftmax) / sizeof(float)));
  plan.sums = reinterpret_cast<PartialSoftmax*>(plan.parts + parts * dim);
  const int units = plan.chunks * shape_.kv_heads, heads = rows * shape_.heads;
  const size_t bytes = plan.keys * static_cast<size_t>(shape_.cached()) * sizeof(uint16_t);
  const int workers = std::min(engine_->workers_for(bytes, shape_.group()), units);
  for (int w = 0; w < workers; ++w) engine_->step.workers[static_cast<size_t>(w)].reserve(part_scratch());
  UnitCounter next_unit, next_head;
  Barrier barrier(workers);
  engine_->pool().run(workers, [&](int worker) {
    uint8_t* scratch = engine_->step.workers[static_cast<size_t>(worker)].bytes();
    if (has_tiles_) engine_->kernels().tile_configure(kTileRows);
    for (int unit = next_unit.take(); unit < units; unit = next_unit.take()) attend_unit(plan, unit, scratch);
    if (has_tiles_) engine_->kernels().tile_release();
    barrier.wait();
    for (int unit = next_head.take(); unit < heads; unit = next_head.take()) {
      join_head(plan, unit / shape_.heads, unit % shape_.heads, out + static_cast<size_t>(unit) * dim);
    }
  });
}

// The queries of one group of one row on one chunk of their keys. Units go key head by key head, as the rows of the cache do.
void GqaStep::attend_unit(const Plan& plan, int unit, uint8_t* scratch) const {
  const int chunk = unit / shape_.kv_heads, group = shape_.group();
  const auto kv_head = static_cast<size_t>(unit % shape_.kv_heads), dim = static_cast<size_t>(shape_.dim);
  const Plan::Row* row = plan.rows;
  while (chunk >= row->offset + row->count) ++row;
  const int at = (row->first + chunk - row->offset) * kPartKeys;
  const int begin = std::max(at, row->begin), end = std::min(at + kPartKeys, row->end);
  const auto stride = static_cast<size_t>(shape_.cached());
  const uint16_t* keys = plan.cache + static_cast<size_t>(begin) * stride + kv_head * dim;
  const KeyRows context = {keys, keys + shape_.keys(), stride, end - begin};
  const size_t first_head = kv_head * static_cast<size_t>(group);
  const size_t first_part = static_cast<size_t>(chunk) * static_cast<size_t>(shape_.heads) + first_head;
  const int most = has_tiles_ ? kPartQueries : kAttendQueries;
  for (int first = 0; first < group; first += most) {
    const auto h = static_cast<size_t>(first);
    attend_part(row->query + (first_head + h) * dim, std::min(most, group - first), context, scratch,
                plan.parts + (first_part + h) * dim, plan.sums + first_part + h);
  }
}

#if defined(__x86_64__)
size_t GqaStep::part_scratch() const {
  return has_tiles_ ? attend_part_scratch(static_cast<size_t>(shape_.dim)) : kAttendQueries * kPartKeys * sizeof(float);
}

void GqaStep::attend_part(const float* queries, int count, const KeyRows& rows, uint8_t* scratch, float* out,
                          PartialSoftmax* sums) const {
  const auto dim = static_cast<size_t>(shape_.dim);
  if (has_tiles_) return attend_part_amx(queries, count, dim, rows, softmax_scale_, scratch, out, sums);
  attend_part_bf16(queries, count, dim, rows, softmax_scale_, reinterpret_cast<float*>(scratch), out, sums);
}
#else
size_t GqaStep::part_scratch() const { return kAttendQueries * kPartKeys * sizeof(float); }

void GqaStep::attend_part(const float* queries, int count, const KeyRows& rows, uint8_t* scratch, float* out,
                          PartialSoftmax* sums) const {
  attend_part_bf16(queries, count, static_cast<size_t>(shape_.dim), rows, softmax_scale_,
                   reinterpret_cast<float*>(scratch), out, sums);
}
#endif

// out [dim]: the sum of a head's chunks, each by its share of the whole softmax.
void GqaStep::join_head(const Plan& plan, int row, int head, float* out) const {
  const auto dim = static_cast<size_t>(shape_.dim), heads = static_cast<size_t>(shape_.heads);
  const size_t first = static_cast<size_t>(plan.rows[row].offset) * heads + static_cast<size_t>(head);
  const auto count = static_cast<size_t>(plan.rows[row].count);
  float largest = plan.sums[first].largest;
  for (size_t i = 1; i < count; ++i) largest = std::max(largest, plan.sums[first + i * heads].largest);
  float total = 0.0f;
  if (!extras_.sinks.empty()) {
    const float sink = extras_.sinks[static_cast<size_t>(head)];
    largest = std::max(largest, sink);
    total = std::exp(sink - largest);
  }
  std::memset(out, 0, dim * sizeof(float));
  for (size_t i = 0; i < count; ++i) {
    const PartialSoftmax& sum = plan.sums[first + i * heads];
    const float share = std::exp(sum.largest - largest);
    total += share * sum.total;
    add_scaled(out, plan.parts + (first + i * heads) * dim, share, dim);
  }
  const float inverse = 1.0f / total;
  for (size_t c = 0; c < dim; ++c) out[c] *= inverse;
}

}  // namespace kt
