// Python sees the engine through this file, step_bindings.cpp and hybrid_bindings.cpp alone. Every array is checked here (arrays.h): dtype,
// shape, contiguity, range.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "arrays.h"
#include "block_pack.h"
#include "ceilings.h"
#include "cpu_features.h"
#include "dequantize_bindings.h"
#include "dispatch.h"
#include "error_bindings.h"
#include "hybrid_bindings.h"
#include "linear.h"
#include "moe.h"
#include "step_bindings.h"

namespace kt {
namespace {

MatrixView matrix(const py::array& w, const char* name) {
  const bool bf16 = is_bf16(w, name);
  check_contiguous(w, name, 2);
  return {w.data(), bf16, checked_int(w.shape(0), name), checked_int(w.shape(1), name)};
}

Input input(const py::array& x, int cols) {
  const bool bf16 = is_bf16(x, "x");
  check_contiguous(x, "x", 2);
  if (x.shape(1) != cols) fail("x has shape " + shape_text(x) + ", expected " + std::to_string(cols) + " columns");
  if (x.shape(0) > (1 << 24)) fail("x has too many rows: " + std::to_string(x.shape(0)));
  return {x.data(), bf16, static_cast<int>(x.shape(0)), cols};
}

int checked_group(int group) {
  if (group != 32 && group != 64 && group != 128)
    fail("group_size must be 32, 64 or 128, got " + std::to_string(group));
  return group;
}

Format int4_format(int group) { return format_by_name("int4_g" + std::to_string(checked_group(group))).format; }

py::dict features() {
  py::dict result;
  for (const FeatureName& feature : feature_names()) result[feature.name] = (cpu_features() & feature.bit) != 0;
  return result;
}

py::list isa_report() {
  py::list report;
  for (const IsaStatus& isa : isa_status()) {
    py::dict entry;
    entry["name"] = isa.table->name;
    entry["supported"] = isa.missing.empty();
    entry["missing"] = isa.missing;
    report.append(entry);
  }
  return report;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const IsaStatus& isa : isa_status()) {
    if (isa.missing.empty()) names.emplace_back(isa.table->name);
  }
  return names;
}

size_t expert_bytes(const std::string& format, int hidden_size, int moe_intermediate_size) {
  return ExpertShape(expert_format_by_name(format), hidden_size, moe_intermediate_size).blob_bytes();
}

void pack_expert_py(const std::string& format, const py::array& gate, const py::array& up, const py::array& down,
                    py::array out) {
  const MatrixView g = matrix(gate, "gate"), u = matrix(up, "up"), d = matrix(down, "down");
  if (u.rows != g.rows || u.cols != g.cols) fail("up has shape " + shape_text(up) + ", gate has " + shape_text(gate));
  if (d.rows != g.cols || d.cols != g.rows)
    fail("down has shape " + shape_text(down) + ", gate has " + shape_text(gate));
  const Format id = format_by_name(format).format;
  const auto bytes = static_cast<py::ssize_t>(ExpertShape(id, g.cols, g.rows).blob_bytes());
  uint8_t* blob = write<uint8_t>(out, "out", {bytes});
  py::gil_scoped_release release;
  pack_expert(id, g, u, d, blob);
}

py::tuple unpack_expert_py(const std::string& format, const py::array& blob, int hidden_size,
                           int moe_intermediate_size) {
  const ExpertFormat id = expert_format_by_name(format);
  const ExpertShape shape(id, hidden_size, moe_intermediate_size);
  const uint8_t* data = read<uint8_t>(blob, "blob", {static_cast<py::ssize_t>(shape.blob_bytes())});
  py::array_t<float> gate({moe_intermediate_size, hidden_size}), up({moe_intermediate_size, hidden_size}),
      down({hidden_size, moe_intermediate_size});
  float *g = gate.mutable_data(), *u = up.mutable_data(), *d = down.mutable_data();
  {
    py::gil_scoped_release release;
    unpack_expert(id, data, hidden_size, moe_intermediate_size, g, u, d);
  }
  return py::make_tuple(gate, up, down);
}

ExpertFormat block_format(const std::string& name) {
  const ExpertFormat format = expert_format_by_name(name);
  if (!format_info(format.gate_up).is_block()) fail(name + " is no block format");
  return format;
}

size_t ggml_bytes(Format format, int rows, int k) {
  return static_cast<size_t>(rows) * ggml_row_bytes(format_info(format), k);
}

void pack_ggml_py(const std::string& format, int hidden_size, int moe_intermediate_size, const py::array& gate,
                  const py::array& up, const py::array& down, py::array out) {
  const ExpertFormat id = block_format(format);
  const ExpertShape shape(id, hidden_size, moe_intermediate_size);  // checks the sizes
  const auto in = static_cast<py::ssize_t>(ggml_bytes(id.gate_up, moe_intermediate_size, hidden_size));
  const auto back = static_cast<py::ssize_t>(ggml_bytes(id.down, hidden_size, moe_intermediate_size));
  const uint8_t *g = read<uint8_t>(gate, "gate", {in}), *u = read<uint8_t>(up, "up", {in});
  const uint8_t* d = read<uint8_t>(down, "down", {back});
  uint8_t* blob = write<uint8_t>(out, "out", {static_cast<py::ssize_t>(shape.blob_bytes())});
  py::gil_scoped_release release;
  pack_ggml_expert(id, hidden_size, moe_intermediate_size, g, u, d, blob);
}

py::tuple unpack_ggml_py(const std::string& format, int hidden_size, int moe_intermediate_size, const py::array& blob) {
  const ExpertFormat id = block_format(format);
  const ExpertShape shape(id, hidden_size, moe_intermediate_size);
  const uint8_t* data = read<uint8_t>(blob, "blob", {static_cast<py::ssize_t>(shape.blob_bytes())});
  const size_t in = ggml_bytes(id.gate_up, moe_intermediate_size, hidden_size);
  py::array_t<uint8_t> gate(in), up(in), down(ggml_bytes(id.down, hidden_size, moe_intermediate_size));
  uint8_t *g = gate.mutable_data(), *u = up.mutable_data(), *d = down.mutable_data();
  {
    py::gil_scoped_release release;
    unpack_ggml_expert(id, hidden_size, moe_intermediate_size, data, g, u, d);
  }
  return py::make_tuple(gate, up, down);
}

py::tuple quantize_int8_py(const py::array& w) {
  const MatrixView view = matrix(w, "w");
  py::array_t<int8_t> q({view.rows, view.cols});
  py::array_t<float> scale(view.rows);
  int8_t* codes = q.mutable_data();
  float* scales = scale.mutable_data();
  {
    py::gil_scoped_release release;
    quantize_int8(view, codes, scales);
  }
  return py::make_tuple(q, scale);
}

py::tuple quantize_int4_py(const py::array& w, int group_size) {
  const MatrixView view = matrix(w, "w");
  const int groups = (view.cols + checked_group(group_size) - 1) / group_size;
  py::array_t<uint8_t> q({view.rows, groups * group_size / 2}), s({view.rows, groups}), z({view.rows, groups});
  py::array_t<float> scale(view.rows);
  uint8_t *codes = q.mutable_data(), *group_scale = s.mutable_data(), *group_zero = z.mutable_data();
  float* scales = scale.mutable_data();
  {
    py::gil_scoped_release release;
    quantize_int4(view, group_size, codes, group_scale, group_zero, scales);
  }
  return py::make_tuple(q, s, z, scale);
}

struct Int4View {
  CodeView codes;
  const float* scale;
};

Int4View int4_view(const py::array& q, const py::array& s, const py::array& z, const py::array& row_scale, int k,
                   int group) {
  const py::ssize_t groups = (checked_int(k, "K") + checked_group(group) - 1) / group;
  if (q.ndim() != 2) fail("q must have 2 dimensions, got " + shape_text(q));
  const py::ssize_t n = checked_int(q.shape(0), "N");
  const uint8_t* codes = read<uint8_t>(q, "q", {n, groups * group / 2});
  const uint8_t* scales = read<uint8_t>(s, "group_scale", {n, groups});
  const uint8_t* zeros = read<uint8_t>(z, "group_zero", {n, groups});
  for (py::ssize_t i = 0; i < n * groups; ++i) {
    if (scales[i] < 1 || scales[i] > 16 || zeros[i] > 128 || scales[i] * 15 - zeros[i] > 127) {
      fail("group_scale " + std::to_string(scales[i]) + " and group_zero " + std::to_string(zeros[i]) + " of row " +
           std::to_string(i / groups) + " leave int8: expected 1 <= s <= 16 and 15 s - 127 <= z <= 128");
    }
  }
  return {{codes, scales, zeros, static_cast<int>(n), k}, read<float>(row_scale, "row_scale", {n})};
}

py::array_t<float> dequantize_int4_py(const py::array& q, const py::array& s, const py::array& z,
                                      const py::array& row_scale, int k, int group_size) {
  const Int4View view = int4_view(q, s, z, row_scale, k, group_size);
  const size_t groups = static_cast<size_t>((k + group_size - 1) / group_size);
  py::array_t<float> w({view.codes.n, k});
  float* out = w.mutable_data();
  py::gil_scoped_release release;
  const uint8_t* codes = static_cast<const uint8_t*>(view.codes.q);
  for (size_t r = 0; r < static_cast<size_t>(view.codes.n); ++r) {
    for (size_t c = 0; c < static_cast<size_t>(k); ++c) {
      const uint8_t pair = codes[(r * groups * group_size + c) / 2];
      const size_t group = r * groups + c / group_size;
      const int code = c % 2 ? pair >> 4 : pair & 15;
      out[r * k + c] = view.scale[r] * static_cast<float>(view.codes.s[group] * code - view.codes.z[group]);
    }
  }
  return w;
}

std::unique_ptr<PackedLinear> linear_from_bf16(std::shared_ptr<Engine> engine, const py::array& w) {
  if (w.ndim() != 2) fail("w must have 2 dimensions, got " + shape_text(w));
  const CodeView codes = {read<uint16_t>(w, "w", {w.shape(0), w.shape(1)}), nullptr, nullptr,
                          checked_int(w.shape(0), "N"), checked_int(w.shape(1), "K")};
  py::gil_scoped_release release;
  return std::make_unique<PackedLinear>(std::move(engine), Format::kBf16, codes, nullptr);
}

std::unique_ptr<PackedLinear> linear_from_int8(std::shared_ptr<Engine> engine, const py::array& q,
                                               const py::array& row_scale) {
  if (q.ndim() != 2) fail("q must have 2 dimensions, got " + shape_text(q));
  const CodeView codes = {read<int8_t>(q, "q", {q.shape(0), q.shape(1)}), nullptr, nullptr,
                          checked_int(q.shape(0), "N"), checked_int(q.shape(1), "K")};
  const float* scale = read<float>(row_scale, "row_scale", {q.shape(0)});
  py::gil_scoped_release release;
  return std::make_unique<PackedLinear>(std::move(engine), Format::kInt8, codes, scale);
}

std::unique_ptr<PackedLinear> linear_from_int4(std::shared_ptr<Engine> engine, const py::array& q, const py::array& s,
                                               const py::array& z, const py::array& row_scale, int k, int group_size) {
  const Int4View view = int4_view(q, s, z, row_scale, k, group_size);
  py::gil_scoped_release release;
  return std::make_unique<PackedLinear>(std::move(engine), int4_format(group_size), view.codes, view.scale);
}

std::unique_ptr<PackedLinear> linear_from_blocks(std::shared_ptr<Engine> engine, const std::string& format,
                                                 const py::array& blocks, int in_features) {
  const ExpertFormat both = block_format(format);
  if (both.gate_up != both.down) fail(format + " is a pair of formats, a matrix has one");
  if (blocks.ndim() != 2) fail("blocks must have 2 dimensions, got " + shape_text(blocks));
  const FormatInfo& info = format_info(both.gate_up);
  const int n = checked_int(blocks.shape(0), "N"), k = checked_int(in_features, "K");
  check_block_inputs(info, k);
  const uint8_t* rows = read<uint8_t>(blocks, "blocks", {n, static_cast<py::ssize_t>(ggml_row_bytes(info, k))});
  py::gil_scoped_release release;
  return std::make_unique<PackedLinear>(std::move(engine), both.gate_up, rows, n, k);
}

void linear_forward(PackedLinear& linear, const py::array& x, py::array out) {
  const Input rows = input(x, linear.in_features());
  const bool out_bf16 = is_bf16(out, "out");
  const std::vector<py::ssize_t> shape = {rows.rows, linear.out_features()};
  void* target = out_bf16 ? static_cast<void*>(write<uint16_t>(out, "out", shape)) : write<float>(out, "out", shape);
  py::gil_scoped_release release;
  if (rows.rows > 0) linear.forward(rows, {target, static_cast<size_t>(linear.out_features()), out_bf16});
}

std::unique_ptr<LayerOverBlobs> make_layer(std::shared_ptr<Engine> engine, int hidden_size, int moe_intermediate_size,
                                           const std::vector<std::string>& names, std::vector<py::array> blobs) {
  if (names.size() != blobs.size()) fail("formats and blobs differ in length");
  std::vector<ExpertBlob> experts;
  for (size_t e = 0; e < blobs.size(); ++e) {
    const ExpertFormat id = expert_format_by_name(names[e]);
    const auto bytes = static_cast<py::ssize_t>(ExpertShape(id, hidden_size, moe_intermediate_size).blob_bytes());
    experts.push_back({id, read<uint8_t>(blobs[e], "blob", {bytes})});
  }
  ExpertLayer layer(std::move(engine), hidden_size, moe_intermediate_size, std::move(experts));
  return std::unique_ptr<LayerOverBlobs>(new LayerOverBlobs{std::move(blobs), std::move(layer)});
}

void layer_forward(LayerOverBlobs& self, const py::array& x, const py::array& ids, const py::array& weights,
                   py::array out) {
  ExpertLayer& layer = self.layer;
  const Input rows = input(x, layer.hidden_size());
  if (ids.ndim() != 2) fail("expert_ids must have 2 dimensions, got " + shape_text(ids));
  const py::ssize_t k = ids.shape(1);
  if (k < 1 || k > 1024) fail("expert_ids must have 1 to 1024 columns, got " + std::to_string(k));
  const Routing routing = {read<int64_t>(ids, "expert_ids", {rows.rows, k}),
                           read<float>(weights, "expert_weights", {rows.rows, k}), static_cast<int>(k)};
  float* target = write<float>(out, "out", {rows.rows, layer.hidden_size()});
  py::gil_scoped_release release;
  if (rows.rows > 0) layer.forward(rows, routing, target);
}

void layer_biases(LayerOverBlobs& self, const py::array& gate, const py::array& up, const py::array& down) {
  const py::ssize_t experts = self.layer.num_experts(), inner = self.layer.moe_intermediate_size();
  const float* g = read<float>(gate, "gate", {experts, inner});
  const float* u = read<float>(up, "up", {experts, inner});
  const float* d = read<float>(down, "down", {experts, self.layer.hidden_size()});
  py::gil_scoped_release release;
  self.layer.set_biases(g, u, d);
}

void layer_gate(LayerOverBlobs& self, float alpha, float limit, float up_offset) {
  if (!(limit > 0.0f)) fail("limit must be above 0, got " + std::to_string(limit));
  py::gil_scoped_release release;
  self.layer.set_gate({alpha, limit, up_offset});
}

double bandwidth_of_memory(Engine& engine, const py::array& memory) {
  const uint8_t* data = read<uint8_t>(memory, "memory", {memory.size()});
  const auto bytes = static_cast<size_t>(memory.size());
  py::gil_scoped_release release;
  return measure_bandwidth(engine, data, bytes);
}

double bandwidth_of_bytes(Engine& engine, size_t bytes) {
  py::gil_scoped_release release;
  return measure_bandwidth(engine, bytes);
}

double compute_ceiling(Engine& engine, double seconds, const std::string& format) {
  const bool bf16 = format_by_name(format).format == Format::kBf16;
  py::gil_scoped_release release;
  return measure_compute(engine, seconds, bf16);
}

NumaMode numa_mode(const std::string& name) {
  if (name == "off") return NumaMode::kOff;
  if (name == "shard") return NumaMode::kShard;
  if (name == "replicate") return NumaMode::kReplicate;
  throw std::invalid_argument("numa must be off, shard or replicate, got " + name);
}

std::shared_ptr<Engine> make_engine(int threads, const std::optional<std::string>& isa, const std::string& numa,
                                    int simulated_nodes) {
  if (simulated_nodes < 0 || simulated_nodes > kMaxNodes)
    fail("simulated_nodes must be 0 to " + std::to_string(kMaxNodes));
  return std::make_shared<Engine>(threads, isa.value_or(""), numa_mode(numa),
                                  simulated_nodes ? simulated_topology(simulated_nodes) : system_topology());
}

std::vector<std::vector<int>> numa_nodes() {
  std::vector<std::vector<int>> cpus;
  for (const Topology::Node& node : system_topology().nodes) cpus.push_back(node.cpus);
  return cpus;
}

}  // namespace
}  // namespace kt

PYBIND11_MODULE(_kernels, m) {
  using namespace kt;
  m.doc() = "CPU kernels of kttools: the expert engine, dense matrices and weight quantisation.";
  m.def("cpu_features", &features);
  m.def("isa_report", &isa_report);
  m.def("available_isas", &available_isas);
  py::dict format_ids;
  for (const FormatInfo& info : formats()) format_ids[info.name] = static_cast<uint32_t>(info.format);
  m.attr("FORMATS") = format_ids;
  py::dict block_ids;
  for (const ExpertFormat& format : block_expert_formats()) block_ids[format.name().c_str()] = format.id();
  m.attr("BLOCK_FORMATS") = block_ids;
  m.def("numa_nodes", &numa_nodes);
  m.def("expert_bytes", &expert_bytes, py::arg("format"), py::arg("hidden_size"), py::arg("moe_intermediate_size"));
  m.def("pack_expert", &pack_expert_py, py::arg("format"), py::arg("gate"), py::arg("up"), py::arg("down"),
        py::arg("out"));
  m.def("unpack_expert", &unpack_expert_py, py::arg("format"), py::arg("blob"), py::arg("hidden_size"),
        py::arg("moe_intermediate_size"));
  m.def("pack_ggml_expert", &pack_ggml_py, py::arg("format"), py::arg("hidden_size"), py::arg("moe_intermediate_size"),
        py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("out"));
  m.def("unpack_ggml_expert", &unpack_ggml_py, py::arg("format"), py::arg("hidden_size"),
        py::arg("moe_intermediate_size"), py::arg("blob"));
  m.def("quantize_int8", &quantize_int8_py, py::arg("w"));
  m.def("quantize_int4", &quantize_int4_py, py::arg("w"), py::arg("group_size"));
  m.def("dequantize_int4", &dequantize_int4_py, py::arg("q"), py::arg("group_scale"), py::arg("group_zero"),
        py::arg("row_scale"), py::arg("in_features"), py::arg("group_size"));

  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init(&make_engine), py::arg("threads"), py::arg("isa") = py::none(), py::arg("numa") = "off",
           py::arg("simulated_nodes") = 0)
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("nodes", &Engine::nodes)
      .def_property_readonly("scratch_bytes", &Engine::scratch_bytes)
      .def_property_readonly("isa", [](const Engine& engine) { return engine.kernels().name; });

  m.def("measure_bandwidth", &bandwidth_of_bytes, py::arg("engine"), py::arg("bytes"));
  m.def("measure_bandwidth", &bandwidth_of_memory, py::arg("engine"), py::arg("memory"));
  m.def("measure_compute", &compute_ceiling, py::arg("engine"), py::arg("seconds"), py::arg("format") = "int8");

  py::class_<LayerOverBlobs>(m, "ExpertLayer")
      .def(py::init(&make_layer), py::arg("engine"), py::arg("hidden_size"), py::arg("moe_intermediate_size"),
           py::arg("formats"), py::arg("blobs"))
      .def_property_readonly("num_experts", [](const LayerOverBlobs& self) { return self.layer.num_experts(); })
      .def_property_readonly("node_bytes", [](const LayerOverBlobs& self) { return self.layer.node_bytes(); })
      .def(
          "make_resident",
          [](LayerOverBlobs& self, int expert) {
            if (expert < 0 || expert >= self.layer.num_experts()) throw py::index_error("expert");
            self.layer.make_resident(expert);
          },
          py::arg("expert"), py::call_guard<py::gil_scoped_release>())
      .def("set_biases", &layer_biases, py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("set_gate", &layer_gate, py::arg("alpha"), py::arg("limit"), py::arg("up_offset"))
      .def("forward", &layer_forward, py::arg("x"), py::arg("expert_ids"), py::arg("expert_weights"), py::arg("out"));

  py::class_<PackedLinear>(m, "PackedLinear")
      .def_static("from_bf16", &linear_from_bf16, py::arg("engine"), py::arg("w"))
      .def_static("from_int8", &linear_from_int8, py::arg("engine"), py::arg("q"), py::arg("row_scale"))
      .def_static("from_int4", &linear_from_int4, py::arg("engine"), py::arg("q"), py::arg("group_scale"),
                  py::arg("group_zero"), py::arg("row_scale"), py::arg("in_features"), py::arg("group_size"))
      .def_static("from_blocks", &linear_from_blocks, py::arg("engine"), py::arg("format"), py::arg("blocks"),
                  py::arg("in_features"))
      .def_property_readonly("out_features", &PackedLinear::out_features)
      .def_property_readonly("in_features", &PackedLinear::in_features)
      .def_property_readonly("nbytes", &PackedLinear::nbytes)
      .def("forward", &linear_forward, py::arg("x"), py::arg("out"));
  bind_dequantize(m);
  bind_errors(m);
  bind_steps(m);
  bind_hybrid(m);
}
