#include "gqa_bindings.h"

#include "gqa_step.h"
#include "step_arguments.h"

namespace kt {
namespace {

using Floats = std::optional<py::array>;

std::optional<Norm> head_norm(const std::optional<NormArgs>& args) {
  return args ? std::optional<Norm>(norm_of(*args)) : std::nullopt;
}

std::unique_ptr<Over<GqaStep>> make_gqa(std::shared_ptr<Engine> engine, int heads, int kv_heads, int dim, int rope,
                                        const std::optional<int>& window, float softmax_scale, const NormArgs& norm,
                                        const Linears& inputs, py::object out, const Floats& input_bias,
                                        const std::optional<NormArgs>& q_norm, const std::optional<NormArgs>& k_norm,
                                        const Floats& sinks, const Floats& out_bias) {
  const GqaShape shape = {checked_int(heads, "heads"), checked_int(kv_heads, "kv_heads"), checked_int(dim, "dim"),
                          checked_int(rope, "rope"), window ? checked_int(*window, "window") : 0};
  GqaExtras extras = {floats_of(input_bias, "input_bias"), head_norm(q_norm), head_norm(k_norm),
                      floats_of(sinks, "sinks"), floats_of(out_bias, "out_bias")};
  std::vector<PackedLinear*> matrices;
  for (const py::object& input : inputs) matrices.push_back(linear_of(input));
  return keep(together(inputs, {out}), GqaStep(std::move(engine), shape, softmax_scale, norm_of(norm),
                                               std::move(matrices), linear_of(out), std::move(extras)));
}

void forward_gqa(Over<GqaStep>& self, py::array hidden, const py::array& rotations, py::array cache,
                 py::ssize_t start) {
  const GqaShape& shape = self.value.shape();
  const int rows = step_rows(hidden);
  if (rows > kMaxStepRows) fail("grouped-query attention takes at most 4 tokens at once");
  float* data = write<float>(hidden, "hidden", {rows, self.value.hidden_size()});
  const float* rotation = read<float>(rotations, "rotations", {rows, shape.rope});
  if (cache.ndim() != 2) fail("cache must have 2 dimensions, got " + shape_text(cache));
  uint16_t* context = write<uint16_t>(cache, "cache", {cache.shape(0), shape.cached()});
  check_context(cache, start, rows);
  py::gil_scoped_release release;
  self.value.forward(data, rows, rotation, context, static_cast<int>(start));
}

}  // namespace

void bind_gqa(py::module_& m) {
  py::class_<Over<GqaStep>>(m, "GqaStep")
      .def(py::init(&make_gqa), py::arg("engine"), py::kw_only(), py::arg("heads"), py::arg("kv_heads"), py::arg("dim"),
           py::arg("rope"), py::arg("window") = py::none(), py::arg("softmax_scale"), py::arg("norm"),
           py::arg("inputs"), py::arg("out"), py::arg("input_bias") = py::none(), py::arg("q_norm") = py::none(),
           py::arg("k_norm") = py::none(), py::arg("sinks") = py::none(), py::arg("out_bias") = py::none())
      .def_property_readonly("takes_many", [](const Over<GqaStep>&) { return false; })
      .def("forward", &forward_gqa, py::arg("hidden"), py::arg("rotations"), py::arg("cache"), py::arg("start"));
}

}  // namespace kt
