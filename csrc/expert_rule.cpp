#include "expert_rule.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace kt {
namespace {

constexpr double kNormEps = 1e-20;  // routing.py: NORM_EPS

[[noreturn]] void refuse(const std::string& problem) { throw std::invalid_argument("an expert rule: " + problem); }

template <typename T>
void check_list(const std::vector<T>& list, int expected, const char* name) {
  if (!list.empty() && list.size() != static_cast<size_t>(expected)) {
    refuse(std::string(name) + " must have " + std::to_string(expected) + " numbers, got " +
           std::to_string(list.size()));
  }
}

// As torch sorts in descending order: a NaN is above everything.
bool is_above(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// As torch's amax: a NaN where there is one.
float largest_of(const float* values, int n) {
  float largest = values[0];
  for (int i = 1; i < n; ++i) {
    if (is_above(values[i], largest)) largest = values[i];
  }
  return largest;
}

// In double, where the order of few such terms changes nothing.
double sum_of(const float* values, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += values[i];
  return sum;
}

}  // namespace

ExpertRule::ExpertRule(const RuleShape& shape, RuleLists lists) : shape_(shape), lists_(std::move(lists)) {
  const bool is_fixed = shape.kind == RuleKind::kFixed;
  if (shape.choices < 1 || shape.num_experts < shape.choices) refuse("no such router");
  if (is_fixed && shape.k < 1) refuse("k must be 1 or more, got " + std::to_string(shape.k));
  if (!is_fixed && (shape.k_min < 1 || shape.k_max < shape.k_min)) {
    refuse("expected 1 <= k_min <= k_max, got " + std::to_string(shape.k_min) + " and " + std::to_string(shape.k_max));
  }
  const int most = is_fixed ? shape.k : shape.k_max;
  if (!lists_.alpha.empty() && lists_.alpha.size() < static_cast<size_t>(most)) {
    refuse("alpha must have " + std::to_string(most) + " numbers or more, got " + std::to_string(lists_.alpha.size()));
  }
  check_list(lists_.ratios, shape.choices, "ratios");
  check_list(lists_.norms, shape.num_experts, "norms");
  check_list(lists_.protect, shape.num_experts, "protect");
  if ((shape.kind == RuleKind::kNaee) != !lists_.ratios.empty()) refuse("ratios belong to kind naee, and to no other");
}

int ExpertRule::width() const {
  return shape_.kind == RuleKind::kFixed ? std::min(shape_.k, shape_.choices) : shape_.choices;
}

void ExpertRule::select(const TokenChoice& token, int64_t* out_ids, float* out_weights) const {
  if (shape_.order != RuleOrder::kChoice || !lists_.protect.empty()) sort(token);
  const int wanted = shape_.kind == RuleKind::kFixed ? shape_.k : count(token);
  const int kept = std::min(wanted, shape_.choices);
  const float scale = shape_.renormalise ? weight_scale(token.weights, kept) : 1.0f;
  const float alpha = lists_.alpha.empty() ? 1.0f : lists_.alpha[static_cast<size_t>(wanted - 1)];
  for (int r = 0; r < width(); ++r) {
    out_ids[r] = r < kept ? token.ids[r] : -1;
    out_weights[r] = r < kept ? token.weights[r] * scale * alpha : 0.0f;
  }
}

// To the sum that all of them have.
float ExpertRule::weight_scale(const float* weights, int kept) const {
  return static_cast<float>(sum_of(weights, shape_.choices) / (sum_of(weights, kept) + kNormEps));
}

// c of a choice.
float ExpertRule::strength(const TokenChoice& token, int rank) const {
  const float weight = token.weights[rank];
  if (shape_.order != RuleOrder::kContribution || lists_.norms.empty()) return weight;
  return weight * lists_.norms[static_cast<size_t>(token.ids[rank])];
}

// The one to keep longest first; of equals the router's first. Insertion: few choices, mostly in order already.
void ExpertRule::sort(const TokenChoice& token) const {
  const auto key = [&](int rank) {
    if (!lists_.protect.empty() && lists_.protect[static_cast<size_t>(token.ids[rank])]) {
      return std::numeric_limits<float>::infinity();
    }
    return shape_.order == RuleOrder::kChoice ? token.scores[rank] : strength(token, rank);
  };
  for (int i = 1; i < shape_.choices; ++i) {
    for (int r = i; r > 0 && is_above(key(r), key(r - 1)); --r) {
      std::swap(token.ids[r], token.ids[r - 1]);
      std::swap(token.weights[r], token.weights[r - 1]);
      std::swap(token.scores[r], token.scores[r - 1]);
    }
  }
}

// How many of the ranked choices are kept.
int ExpertRule::count(const TokenChoice& token) const {
  return std::min(std::max(matching(token), shape_.k_min), shape_.k_max);
}

// How many the kind's own condition holds for.
int ExpertRule::matching(const TokenChoice& token) const {
  const int choices = shape_.choices;
  const auto threshold = static_cast<float>(shape_.threshold);
  const float* weights = token.weights;
  int found = 0;
  if (shape_.kind == RuleKind::kAdaptive) {
    for (int r = 0; r < choices; ++r) {
      const float c = strength(token, r);
      found += c * c * shape_.sigma >= threshold;
    }
  } else if (shape_.kind == RuleKind::kSer) {
    const float least = threshold * largest_of(token.scores, choices);
    for (int r = 0; r < choices; ++r) found += token.scores[r] >= least;
  } else if (shape_.kind == RuleKind::kTopP) {
    const double share = shape_.threshold * sum_of(weights, choices);
    double sum = 0.0;
    for (int r = 0; r < choices; ++r) {
      sum += weights[r];
      found += sum - weights[r] < share;
    }
  } else {
    const float largest = largest_of(weights, choices);
    while (found < choices && weights[found] >= lists_.ratios[static_cast<size_t>(found)] * largest) ++found;
  }
  return found;
}

}  // namespace kt
