#include "step_bindings.h"

#include "gqa_bindings.h"
#include "latent_step.h"
#include "router_bindings.h"
#include "step.h"
#include "step_arguments.h"

namespace kt {
namespace {

std::unique_ptr<Over<DenseStep>> make_dense(std::shared_ptr<Engine> engine, const NormArgs& norm,
                                            const Linears& gate_up, py::object down) {
  GatedMlp mlp(engine, pair_of(gate_up), linear_of(down));
  return keep(together(gate_up, {down}), DenseStep(engine, norm_of(norm), std::move(mlp)));
}

std::unique_ptr<Over<MoeStep>> make_moe(std::shared_ptr<Engine> engine, const NormArgs& norm, py::object router,
                                        py::object experts, const Linears& shared_gate_up, py::object shared_down,
                                        const std::optional<py::array>& shared_gate) {
  std::unique_ptr<GatedMlp> shared;
  if (!shared_down.is_none()) {
    shared = std::make_unique<GatedMlp>(engine, pair_of(shared_gate_up), linear_of(shared_down));
  }
  MoeStep step(engine, norm_of(norm), &router.cast<Over<Router>&>().value, &experts.cast<LayerOverBlobs&>().layer,
               std::move(shared), floats_of(shared_gate, "shared_gate"));
  return keep(together(shared_gate_up, {router, experts, shared_down}), std::move(step));
}

void forward_dense(Over<DenseStep>& self, py::array hidden) {
  const int rows = step_rows(hidden);
  float* data = write<float>(hidden, "hidden", {rows, self.value.hidden_size()});
  py::gil_scoped_release release;
  self.value.forward(data, rows);
}

LatentShape latent_shape(const py::array& up_key, const py::array& up_value, int rope) {
  if (up_key.ndim() != 3 || up_value.ndim() != 3) fail("up_key and up_value must have 3 dimensions");
  return {checked_int(up_key.shape(0), "heads"), checked_int(up_key.shape(1), "nope"), checked_int(rope, "rope"),
          checked_int(up_value.shape(1), "value"), checked_int(up_key.shape(2), "latent")};
}

LatentWeights latent_weights(const LatentShape& shape, const py::array& up_key, const py::array& up_value) {
  return {read<uint16_t>(up_key, "up_key", {shape.heads, shape.nope, shape.latent}),
          read<uint16_t>(up_value, "up_value", {shape.heads, shape.value, shape.latent})};
}

void forward_moe(Over<MoeStep>& self, py::array hidden, const ExpertRule* rule) {
  const int rows = step_rows(hidden);
  float* data = write<float>(hidden, "hidden", {rows, self.value.hidden_size()});
  py::gil_scoped_release release;
  self.value.forward(data, rows, rule);
}

void route_step(Over<MoeStep>& self, const py::array& hidden, py::array x, py::array ids, py::array weights,
                std::optional<py::array> scores, const ExpertRule* rule) {
  const int rows = step_rows(hidden), width = self.value.hidden_size();
  const float* data = read<float>(hidden, "hidden", {rows, width});
  float* normed = write<float>(x, "x", {rows, width});
  const TokenChoice out = choice_of(self.value.router(), rows, ids, weights, scores, rule);
  py::gil_scoped_release release;
  self.value.route(data, rows, normed, out, rule);
}

void forward_routed(Over<MoeStep>& self, py::array hidden, const py::array& x, const py::array& ids,
                    const py::array& weights) {
  const int rows = step_rows(hidden), width = self.value.hidden_size();
  float* data = write<float>(hidden, "hidden", {rows, width});
  const float* normed = read<float>(x, "x", {rows, width});
  if (ids.ndim() != 2) fail("ids must have 2 dimensions, got " + shape_text(ids));
  const int k = checked_int(ids.shape(1), "k");
  const Routing routing = {read<int64_t>(ids, "ids", {rows, k}), read<float>(weights, "weights", {rows, k}), k};
  py::gil_scoped_release release;
  self.value.forward_routed(data, normed, rows, routing);
}

std::unique_ptr<Over<LatentStep>> make_latent(std::shared_ptr<Engine> engine, int rope, float softmax_scale,
                                              const NormArgs& norm, const Linears& inputs,
                                              const std::optional<NormArgs>& q_norm, py::object q_b,
                                              const NormArgs& kv_norm, const py::array& up_key,
                                              const py::array& up_value, py::object out) {
  const LatentShape shape = latent_shape(up_key, up_value, rope);
  const LatentWeights weights = latent_weights(shape, up_key, up_value);
  std::unique_ptr<Norm> query_norm = q_norm ? std::make_unique<Norm>(norm_of(*q_norm)) : nullptr;
  PackedLinear* second = q_b.is_none() ? nullptr : linear_of(q_b);
  LatentStep step(engine, shape, softmax_scale, weights, norm_of(norm), pair_of(inputs), std::move(query_norm), second,
                  norm_of(kv_norm), linear_of(out));
  return keep(together(inputs, {q_b, out, up_key, up_value}), std::move(step));
}

void forward_latent(Over<LatentStep>& self, py::array hidden, const py::array& rotations, py::array cache,
                    py::ssize_t start) {
  const LatentShape& shape = self.value.shape();
  const int rows = step_rows(hidden);
  if (rows > kMaxStepRows && !self.value.takes_many()) fail("no kernel here attends with more than 4 tokens at once");
  float* data = write<float>(hidden, "hidden", {rows, self.value.hidden_size()});
  const float* rotation = read<float>(rotations, "rotations", {rows, shape.rope});
  if (cache.ndim() != 2) fail("cache must have 2 dimensions, got " + shape_text(cache));
  uint16_t* context = write<uint16_t>(cache, "cache", {cache.shape(0), shape.cached()});
  check_context(cache, start, rows);
  py::gil_scoped_release release;
  self.value.forward(data, rows, rotation, context, static_cast<int>(start));
}

}  // namespace

void bind_steps(py::module_& m) {
  m.attr("MAX_STEP_ROWS") = kMaxStepRows;
  bind_gqa(m);
  bind_router(m);
  py::class_<Over<DenseStep>>(m, "DenseStep")
      .def(py::init(&make_dense), py::arg("engine"), py::arg("norm"), py::arg("gate_up"), py::arg("down"))
      .def("forward", &forward_dense, py::arg("hidden"));
  py::class_<Over<MoeStep>>(m, "MoeStep")
      .def(py::init(&make_moe), py::arg("engine"), py::arg("norm"), py::arg("router"), py::arg("experts"),
           py::arg("shared_gate_up"), py::arg("shared_down") = py::none(), py::arg("shared_gate") = py::none())
      .def("forward", &forward_moe, py::arg("hidden"), py::arg("rule") = py::none())
      .def("route", &route_step, py::arg("hidden"), py::arg("x"), py::arg("ids"), py::arg("weights"),
           py::arg("scores") = py::none(), py::arg("rule") = py::none())
      .def("forward_routed", &forward_routed, py::arg("hidden"), py::arg("x"), py::arg("ids"), py::arg("weights"));
  py::class_<Over<LatentStep>>(m, "LatentStep")
      .def(py::init(&make_latent), py::arg("engine"), py::arg("rope"), py::arg("softmax_scale"), py::arg("norm"),
           py::arg("inputs"), py::arg("q_norm"), py::arg("q_b"), py::arg("kv_norm"), py::arg("up_key"),
           py::arg("up_value"), py::arg("out"))
      .def_property_readonly("takes_many", [](const Over<LatentStep>& self) { return self.value.takes_many(); })
      .def("forward", &forward_latent, py::arg("hidden"), py::arg("rotations"), py::arg("cache"), py::arg("start"));
}

}  // namespace kt
