#include "router.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "row_math.h"

namespace kt {
namespace {

constexpr float kNormEps = 1e-20f;  // routing.py: NORM_EPS
constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool is_bf16_exact(const float* values, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    if (bits & 0xFFFF) return false;
  }
  return true;
}

// What is compared: a NaN is taken first, as torch's topk does, so that it is seen in the result.
float comparable(float value) { return std::isnan(value) ? kInfinity : value; }

int index_of_largest(const std::vector<float>& values) {
  return static_cast<int>(std::max_element(values.begin(), values.end()) - values.begin());
}

}  // namespace

Router::Router(std::shared_ptr<Engine> engine, const RouterShape& shape, const float* weight, std::vector<float> bias,
               std::vector<float> logit_bias)
    : engine_(std::move(engine)),
      shape_(shape),
      weight_(weight),
      bias_(std::move(bias)),
      logit_bias_(std::move(logit_bias)) {
  const bool grouped = shape.groups >= 1 && shape.top_groups >= 1 && shape.top_groups <= shape.groups &&
                       shape.num_experts % shape.groups == 0;
  const int eligible = grouped ? shape.num_experts / shape.groups * shape.top_groups : 0;
  if (shape.num_experts < 1 || shape.hidden_size < 1 || shape.k < 1 || shape.k > eligible) {
    throw std::invalid_argument("a router cannot choose " + std::to_string(shape.k) + " of " +
                                std::to_string(shape.num_experts) + " experts in " + std::to_string(shape.top_groups) +
                                " of " + std::to_string(shape.groups) + " groups");
  }
  const auto experts = static_cast<size_t>(shape.num_experts);
  for (const std::vector<float>* each : {&bias_, &logit_bias_}) {
    if (!each->empty() && each->size() != experts) throw std::invalid_argument("bias and experts differ in number");
  }
  const size_t count = experts * static_cast<size_t>(shape.hidden_size);
  if (!is_bf16_exact(weight, count)) return;
  weight_bf16_.resize(count);
  round_bf16(weight, count, weight_bf16_.data());
}

// What choosing for one row needs beside its scores.
struct Router::Scratch {
  explicit Scratch(const RouterShape& shape)
      : choice(static_cast<size_t>(shape.num_experts)),
        group(static_cast<size_t>(shape.groups)),
        is_kept(group.size()),
        ids(static_cast<size_t>(shape.k)),
        weights(ids.size()),
        scores(ids.size()) {}

  std::vector<float> choice, group;
  std::vector<uint8_t> is_kept;
  std::vector<int64_t> ids;  // the native choice, where a rule makes another of it
  std::vector<float> weights, scores;
};

void Router::forward(const float* x, int rows, const TokenChoice& out, const ExpertRule* rule) {
  const auto experts = static_cast<size_t>(shape_.num_experts), width = static_cast<size_t>(shape_.hidden_size);
  if (rule) check_rule(*rule);
  scores_.resize(static_cast<size_t>(rows) * experts);
  const size_t item = weight_bf16_.empty() ? sizeof(float) : sizeof(uint16_t);
  const int workers = engine_->workers_for(experts * width * item, rows);
  // Few tokens share out the experts, many themselves.
  const int cuts = rows < 4 * workers ? workers : 1;
  UnitCounter next;
  engine_->pool().run(workers, [&](int) {
    Scratch scratch(shape_);
    for (int unit = next.take(); unit < rows * cuts; unit = next.take()) {
      const auto row = static_cast<size_t>(unit / cuts);
      const int cut = unit % cuts;
      float* all = scores_.data() + row * experts;
      logits(x + row * width, shape_.num_experts * cut / cuts, shape_.num_experts * (cut + 1) / cuts, all);
      if (cuts == 1) choose_row(all, row, out, rule, scratch);
    }
  });
  if (cuts == 1) return;
  Scratch scratch(shape_);
  for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
    choose_row(scores_.data() + row * experts, row, out, rule, scratch);
  }
}

void Router::check_rule(const ExpertRule& rule) const {
  const RuleShape& other = rule.shape();
  if (other.num_experts == shape_.num_experts && other.choices == shape_.k) return;
  throw std::invalid_argument("a rule for " + std::to_string(other.choices) + " of " +
                              std::to_string(other.num_experts) + " experts, but the router chooses " +
                              std::to_string(shape_.k) + " of " + std::to_string(shape_.num_experts));
}

// `out` of all rows.
void Router::choose_row(float* scores, size_t row, const TokenChoice& out, const ExpertRule* rule,
                        Scratch& scratch) const {
  const auto k = static_cast<size_t>(shape_.k), first = row * static_cast<size_t>(width(rule));
  if (!rule) {
    return choose(scores, {out.ids + first, out.weights + first, out.scores ? out.scores + row * k : nullptr}, scratch);
  }
  const TokenChoice native = {scratch.ids.data(), scratch.weights.data(), scratch.scores.data()};
  choose(scores, native, scratch);
  rule->select(native, out.ids + first, out.weights + first);
}

// Of experts [begin, end).
void Router::logits(const float* x, int begin, int end, float* out) const {
  const auto width = static_cast<size_t>(shape_.hidden_size), first = static_cast<size_t>(begin) * width;
  if (weight_bf16_.empty()) {
    dot_rows_f32(x, weight_ + first, end - begin, width, out + begin);
  } else {
    dot_rows_bf16(x, weight_bf16_.data() + first, end - begin, width, out + begin);
  }
  for (int e = begin; e < end && !logit_bias_.empty(); ++e) out[e] += logit_bias_[static_cast<size_t>(e)];
}

void Router::choose(float* scores, const TokenChoice& out, Scratch& scratch) const {
  const auto experts = static_cast<size_t>(shape_.num_experts);
  if (shape_.kind == RouterKind::kSigmoidBiasGroups) {
    for (size_t e = 0; e < experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
  } else {
    const float largest = *std::max_element(scores, scores + experts);
    float total = 0.0f;
    for (size_t e = 0; e < experts; ++e) total += scores[e] = std::exp(scores[e] - largest);
    for (size_t e = 0; e < experts; ++e) scores[e] /= total;
  }
  std::vector<float>& choice = scratch.choice;
  for (size_t e = 0; e < experts; ++e) choice[e] = comparable(scores[e] + (bias_.empty() ? 0.0f : bias_[e]));
  limit_groups(scratch);
  float total = 0.0f;
  for (int i = 0; i < shape_.k; ++i) {
    const int best = index_of_largest(choice);
    if (out.scores) out.scores[i] = choice[static_cast<size_t>(best)];
    choice[static_cast<size_t>(best)] = -kInfinity;
    out.ids[i] = best;
    out.weights[i] = scores[best];
    total += scores[best];
  }
  const float scale = shape_.normalise ? shape_.scale / (total + kNormEps) : shape_.scale;
  for (int i = 0; i < shape_.k; ++i) out.weights[i] *= scale;
}

// A group's score: the sum of its two best choices (sigmoid), or its best (softmax).
void Router::limit_groups(Scratch& scratch) const {
  if (shape_.top_groups == shape_.groups) return;
  const int size = shape_.num_experts / shape_.groups;
  std::vector<float>&choice = scratch.choice, &group = scratch.group;
  for (int g = 0; g < shape_.groups; ++g) {
    float first = -kInfinity, second = -kInfinity;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      const float value = choice[static_cast<size_t>(e)];
      second = std::max(second, std::min(first, value));
      first = std::max(first, value);
    }
    const bool sum_of_two = shape_.kind == RouterKind::kSigmoidBiasGroups;
    group[static_cast<size_t>(g)] = comparable(sum_of_two ? first + second : first);
  }
  std::fill(scratch.is_kept.begin(), scratch.is_kept.end(), uint8_t{0});
  for (int i = 0; i < shape_.top_groups; ++i) {
    const auto best = static_cast<size_t>(index_of_largest(group));
    scratch.is_kept[best] = 1;
    group[best] = -kInfinity;
  }
  for (size_t e = 0; e < choice.size(); ++e) {
    if (!scratch.is_kept[e / static_cast<size_t>(size)]) choice[e] = -kInfinity;
  }
}

}  // namespace kt
