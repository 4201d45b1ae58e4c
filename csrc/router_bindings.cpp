#include "router_bindings.h"

#include "step_arguments.h"

namespace kt {

TokenChoice choice_of(const Router& router, int rows, py::array& ids, py::array& weights,
                      std::optional<py::array>& scores, const ExpertRule* rule) {
  if (scores && rule) fail("scores are the native choice's: none with a rule");
  const int width = router.width(rule);
  return {write<int64_t>(ids, "ids", {rows, width}), write<float>(weights, "weights", {rows, width}),
          scores ? write<float>(*scores, "scores", {rows, router.shape().k}) : nullptr};
}

namespace {

template <typename T>
struct Named {
  const char* name;
  T value;
};

constexpr Named<RouterKind> kRouterKinds[] = {{"sigmoid_bias_groups", RouterKind::kSigmoidBiasGroups},
                                              {"softmax_groups", RouterKind::kSoftmaxGroups}};
constexpr Named<RuleKind> kRuleKinds[] = {{"uniform", RuleKind::kFixed},     {"static", RuleKind::kFixed},
                                          {"adaptive", RuleKind::kAdaptive}, {"ser", RuleKind::kSer},
                                          {"top_p", RuleKind::kTopP},        {"naee", RuleKind::kNaee}};
constexpr Named<RuleOrder> kRuleOrders[] = {
    {"choice", RuleOrder::kChoice}, {"weight", RuleOrder::kWeight}, {"contribution", RuleOrder::kContribution}};

template <typename T, size_t n>
T by_name(const Named<T> (&known)[n], const std::string& name, const char* what) {
  std::string names;
  for (const Named<T>& each : known) {
    if (name == each.name) return each.value;
    names += (names.empty() ? "" : ", ") + std::string(each.name);
  }
  fail(std::string("unknown ") + what + " " + name + ": expected one of " + names);
}

std::unique_ptr<Over<Router>> make_router(std::shared_ptr<Engine> engine, const std::string& kind, int groups,
                                          int top_groups, int k, bool normalise, float scale, const py::array& weight,
                                          const std::optional<py::array>& bias,
                                          const std::optional<py::array>& logit_bias) {
  if (weight.ndim() != 2) fail("weight must have 2 dimensions, got " + shape_text(weight));
  const RouterShape shape = {by_name(kRouterKinds, kind, "router"),
                             checked_int(weight.shape(0), "experts"),
                             checked_int(weight.shape(1), "hidden_size"),
                             groups,
                             top_groups,
                             k,
                             normalise,
                             scale};
  const float* data = read<float>(weight, "weight", {shape.num_experts, shape.hidden_size});
  return keep({weight},
              Router(std::move(engine), shape, data, floats_of(bias, "bias"), floats_of(logit_bias, "logit_bias")));
}

void route(Over<Router>& self, const py::array& x, py::array ids, py::array weights, std::optional<py::array> scores,
           const ExpertRule* rule) {
  const int rows = step_rows(x);
  const float* data = read<float>(x, "x", {rows, self.value.shape().hidden_size});
  const TokenChoice out = choice_of(self.value, rows, ids, weights, scores, rule);
  py::gil_scoped_release release;
  self.value.forward(data, rows, out, rule);
}

std::vector<uint8_t> flags_of(const std::optional<py::array>& flags, const char* name) {
  if (!flags) return {};
  const bool* data = read<bool>(*flags, name, {flags->size()});
  return std::vector<uint8_t>(data, data + flags->size());
}

ExpertRule make_rule(const std::string& kind, const std::string& order, int num_experts, int choices, int k, int k_min,
                     int k_max, double threshold, float sigma, bool renormalise, const std::optional<py::array>& alpha,
                     const std::optional<py::array>& ratios, const std::optional<py::array>& norms,
                     const std::optional<py::array>& protect) {
  const RuleShape shape = {by_name(kRuleKinds, kind, "kind"),
                           by_name(kRuleOrders, order, "order"),
                           checked_int(num_experts, "experts"),
                           checked_int(choices, "choices"),
                           k,
                           k_min,
                           k_max,
                           threshold,
                           sigma,
                           renormalise};
  return ExpertRule(shape, {floats_of(alpha, "alpha"), floats_of(ratios, "ratios"), floats_of(norms, "norms"),
                            flags_of(protect, "protect")});
}

}  // namespace

void bind_router(py::module_& m) {
  py::class_<ExpertRule>(m, "ExpertRule")
      .def(py::init(&make_rule), py::kw_only(), py::arg("kind"), py::arg("order"), py::arg("num_experts"),
           py::arg("choices"), py::arg("k"), py::arg("k_min"), py::arg("k_max"), py::arg("threshold"), py::arg("sigma"),
           py::arg("renormalise"), py::arg("alpha") = py::none(), py::arg("ratios") = py::none(),
           py::arg("norms") = py::none(), py::arg("protect") = py::none())
      .def_property_readonly("width", &ExpertRule::width);
  py::class_<Over<Router>>(m, "Router")
      .def(py::init(&make_router), py::arg("engine"), py::arg("kind"), py::arg("groups"), py::arg("top_groups"),
           py::arg("k"), py::arg("normalise"), py::arg("scale"), py::arg("weight"), py::arg("bias") = py::none(),
           py::arg("logit_bias") = py::none())
      .def("forward", &route, py::arg("x"), py::arg("ids"), py::arg("weights"), py::arg("scores") = py::none(),
           py::arg("rule") = py::none());
}

}  // namespace kt
