// What an expert table keeps of a token's native choice: what kttools_runtime/expert_policy.py does with torch, to the bit.
#pragma once

#include <cstdint>
#include <vector>

namespace kt {

enum class RuleKind { kFixed, kAdaptive, kSer, kTopP, kNaee };
enum class RuleOrder { kChoice, kWeight, kContribution };

// Fields as expert_policy.py's LayerPolicy has them.
struct RuleShape {
  RuleKind kind;
  RuleOrder order;
  int num_experts;  // of the router
  int choices;      // of a token by the router
  int k;
  int k_min;
  int k_max;
  double threshold;
  float sigma;
  bool renormalise;
};

// Where an option is a list, an empty one is none. protect: not 0 for experts that are ranked first.
struct RuleLists {
  std::vector<float> alpha;
  std::vector<float> ratios;
  std::vector<float> norms;
  std::vector<uint8_t> protect;
};

// One token's choices, best first; [choices] each. ids are in [0, num_experts).
struct TokenChoice {
  int64_t* ids;
  float* weights;
  float* scores;  // what was compared
};

class ExpertRule {
 public:
  // Throws std::invalid_argument on counts and lists that do not fit the router.
  ExpertRule(const RuleShape& shape, RuleLists lists);

  const RuleShape& shape() const { return shape_; }
  // Ids and weights that a token gets: as many as are kept where all tokens keep the same, else all choices, with id -1 and
  // weight 0 for the dropped.
  int width() const;
  // out_ids, out_weights [width()]; token is sorted in place. Many threads may select at a time.
  void select(const TokenChoice& token, int64_t* out_ids, float* out_weights) const;

 private:
  float strength(const TokenChoice& token, int rank) const;
  void sort(const TokenChoice& token) const;
  int count(const TokenChoice& token) const;
  int matching(const TokenChoice& token) const;
  float weight_scale(const float* weights, int kept) const;

  RuleShape shape_;
  RuleLists lists_;
};

}  // namespace kt
