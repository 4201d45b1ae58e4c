#include "latent_step.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "latent_prefill.h"
#include "row_math.h"

namespace kt {
namespace {

float* reserve_floats(Buffer& buffer, size_t count) {
  buffer.reserve(count * sizeof(float));
  return buffer.as<float>();
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("latent attention: ") + what);
}

}  // namespace

LatentStep::LatentStep(std::shared_ptr<Engine> engine, const LatentShape& shape, float softmax_scale,
                       const LatentWeights& weights, Norm norm, LinearPair inputs, std::unique_ptr<Norm> q_norm,
                       PackedLinear* q_b, Norm kv_norm, PackedLinear* out)
    : engine_(std::move(engine)),
      shape_(shape),
      softmax_scale_(softmax_scale),
      weights_(weights),
      norm_(std::move(norm)),
      inputs_(inputs),
      q_norm_(std::move(q_norm)),
      q_b_(q_b),
      kv_norm_(std::move(kv_norm)),
      out_(out) {
  const int queries = shape.heads * shape.key();
  require((q_norm_ != nullptr) == (q_b != nullptr), "q_norm and q_b belong together");
  require(shape.rope % 2 == 0, "the rotary part must be even");
  require(inputs.in_features() == hidden_size() && out->out_features() == hidden_size(), "sizes of the hidden row");
  require(inputs.out_features() == (q_b ? q_b->in_features() : queries) + shape.cached(), "outputs of the inputs");
  require(!q_b || (q_b->out_features() == queries && q_norm_->size() == q_b->in_features()), "sizes of q_b");
  require(kv_norm_.size() == shape.latent, "size of kv_norm");
  require(out->in_features() == shape.heads * shape.value, "inputs of o_proj");
}

void LatentStep::forward(float* hidden, int rows, const float* rotations, uint16_t* cache, int start) {
  std::lock_guard<std::mutex> stepping(engine_->stepping());
  const int most = takes_many() ? kMaxGroupRows : kMaxStepRows;
  for (int first = 0; first < rows; first += most) {
    forward_group(hidden + static_cast<size_t>(first) * static_cast<size_t>(hidden_size()),
                  std::min(most, rows - first),
                  rotations + static_cast<size_t>(first) * static_cast<size_t>(shape_.rope), cache, start + first);
  }
}

void LatentStep::forward_group(float* hidden, int rows, const float* rotations, uint16_t* cache, int start) {
  StepScratch& step = engine_->step;
  const auto count = static_cast<size_t>(rows), width = static_cast<size_t>(hidden_size());
  const auto projected_width = static_cast<size_t>(inputs_.out_features());
  const auto cached = static_cast<size_t>(shape_.cached()), rope = static_cast<size_t>(shape_.rope);
  const auto attended_width = static_cast<size_t>(shape_.heads * shape_.value);
  const auto position = [start](size_t row) { return static_cast<size_t>(start) + row; };
  float* x = reserve_floats(step.normed, count * width);
  each_row(*engine_, rows, [&](size_t r) { norm_.apply(hidden + r * width, x + r * width); });
  float* projected = reserve_floats(step.projected, count * projected_width);
  inputs_.forward(x, rows, projected);
  float* query = queries(projected, rows);
  const size_t query_width = q_b_ ? static_cast<size_t>(q_b_->out_features()) : projected_width;
  each_row(*engine_, rows, [&](size_t r) {
    append(projected + (r + 1) * projected_width - cached, rotations + r * rope, cache + position(r) * cached);
  });
  float* attended = reserve_floats(step.heads, count * attended_width);
  if (rows > kMaxStepRows) {
    latent_prefill(*engine_, shape_, weights_, softmax_scale_, {query, query_width, rows, start, rotations}, cache,
                   attended);
  } else {
    for (size_t r = 0; r < count; ++r) {
      float* own = query + r * query_width;
      for (int h = 0; h < shape_.heads; ++h)
        rotate_pairs(own + h * shape_.key() + shape_.nope, rotations + r * rope, rope / 2);
      attend(own, cache, static_cast<int>(position(r)) + 1, attended + r * attended_width);
    }
  }
  out_->forward(step_input(attended, rows, out_->in_features()), {hidden, width, false, true});
}

// [rows, heads * key()], or the whole projected rows where they begin with it.
float* LatentStep::queries(const float* projected, int rows) const {
  if (!q_b_) return const_cast<float*>(projected);
  const auto rank = static_cast<size_t>(q_b_->in_features()), width = static_cast<size_t>(inputs_.out_features());
  // First the normed rows, then the queries made of them.
  float* normed = reserve_floats(engine_->step.inner, static_cast<size_t>(rows) * (rank + q_b_->out_features()));
  each_row(*engine_, rows, [&](size_t r) { q_norm_->apply(projected + r * width, normed + r * rank); });
  float* query = normed + static_cast<size_t>(rows) * rank;
  q_b_->forward(step_input(normed, rows, q_b_->in_features()), {query, static_cast<size_t>(q_b_->out_features())});
  return query;
}

void LatentStep::append(float* compressed, const float* rotation, uint16_t* row) const {
  kv_norm_.apply(compressed, compressed);
  rotate_pairs(compressed + shape_.latent, rotation, static_cast<size_t>(shape_.rope) / 2);
  round_bf16(compressed, static_cast<size_t>(shape_.cached()), row);
}

// One token: query [heads, key()] rotated, cache [keys, cached()] -> out [heads, value].
void LatentStep::attend(const float* query, const uint16_t* cache, int keys, float* out) {
  const size_t weight_bytes =
      static_cast<size_t>(shape_.heads) * static_cast<size_t>(shape_.nope + shape_.value) * shape_.latent * 2;
  const size_t key_bytes = static_cast<size_t>(shape_.heads) * static_cast<size_t>(keys) * shape_.cached() * 2;
  const int workers = std::min(engine_->workers_for(weight_bytes + key_bytes, 1), shape_.heads);
  const size_t per_query = static_cast<size_t>(shape_.cached()) + shape_.latent + static_cast<size_t>(keys);
  for (int w = 0; w < workers; ++w) {
    engine_->step.workers[static_cast<size_t>(w)].reserve(kAttendQueries * per_query * sizeof(float));
  }
  engine_->pool().run(workers, [&](int worker) {
    attend_heads(query, cache, keys, shape_.heads * worker / workers, shape_.heads * (worker + 1) / workers,
                 engine_->step.workers[static_cast<size_t>(worker)], out);
  });
}

void LatentStep::attend_heads(const float* query, const uint16_t* cache, int keys, int begin, int end, Buffer& scratch,
                              float* out) const {
  const auto latent = static_cast<size_t>(shape_.latent), cached = static_cast<size_t>(shape_.cached());
  const auto nope = static_cast<size_t>(shape_.nope), value = static_cast<size_t>(shape_.value);
  float* absorbed = scratch.as<float>();
  float* mixed = absorbed + kAttendQueries * cached;
  float* scores = mixed + kAttendQueries * latent;
  for (int first = begin; first < end; first += kAttendQueries) {
    const int count = std::min(kAttendQueries, end - first);
    for (int i = 0; i < count; ++i) {
      const auto head = static_cast<size_t>(first + i);
      const float* own = query + head * static_cast<size_t>(shape_.key());
      float* row = absorbed + static_cast<size_t>(i) * cached;
      sum_rows_bf16(own, weights_.up_key + head * nope * latent, shape_.nope, latent, row);
      std::memcpy(row + latent, own + nope, static_cast<size_t>(shape_.rope) * sizeof(float));
    }
    attend_shared_bf16(absorbed, count, cached, cache, cached, keys, latent, softmax_scale_, scores, mixed);
    for (int i = 0; i < count; ++i) {
      const auto head = static_cast<size_t>(first + i);
      dot_rows_bf16(mixed + static_cast<size_t>(i) * latent, weights_.up_value + head * value * latent, shape_.value,
                    latent, out + head * value);
    }
  }
}

}  // namespace kt
