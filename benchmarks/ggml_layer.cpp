// The routed experts of one MoE layer in ggml, as llama.cpp builds them: gate and up by mul_mat_id, SwiGLU, down, the
// weighted sum. benchmarks/isa.py runs it beside our engine and says how it is built.
//
//   ggml_layer HIDDEN INTERMEDIATE EXPERTS TOP_K q8_0|q4_0|q4_K THREADS REPACK
//
// Every line of standard input is a number of tokens: one untimed call of one token, then a timed one with fresh random
// activations and distinct ids; "seconds experts_hit rms_of_output" is printed. Inputs and the graph are made before the
// clock starts. Weights: one expert of Gaussian values, quantised and copied, in huge pages where there are any. REPACK
// 1: in the buffer type that llama.cpp would choose for them, 0: as in the file.
#include <sys/mman.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Shape {
  int64_t hidden, intermediate, experts, top_k;
};

struct FreeContext {
  void operator()(ggml_context* context) const { ggml_free(context); }
};
using Context = std::unique_ptr<ggml_context, FreeContext>;

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "ggml_layer: %s\n", why.c_str());
  std::exit(1);
}

Context new_context() {
  ggml_context* context = ggml_init({ggml_tensor_overhead() * 256 + ggml_graph_overhead(), nullptr, true});
  if (!context) fail("no memory for a context");
  return Context(context);
}

ggml_type type_of(const std::string& name) {
  for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
    const char* known = ggml_type_name(static_cast<ggml_type>(i));
    if (known && name == known) return static_cast<ggml_type>(i);
  }
  fail("unknown type " + name);
}

// The first extra buffer type of the CPU (repacked weights), or the plain one.
ggml_backend_buffer_type_t buffer_type(ggml_backend_t backend, bool repack) {
  ggml_backend_dev_t device = ggml_backend_get_device(backend);
  auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  if (repack && extra) {
    for (ggml_backend_buffer_type_t* type = extra(device); type && *type; ++type) {
      if (std::strstr(ggml_backend_buft_name(*type), "REPACK")) return *type;
    }
  }
  return ggml_backend_get_default_buffer_type(backend);
}

struct Layer {
  Shape shape;
  Context context = new_context();
  ggml_tensor *gate = nullptr, *up = nullptr, *down = nullptr;

  Layer(const Shape& sizes, ggml_type type, ggml_backend_t backend, bool repack) : shape(sizes) {
    gate = ggml_new_tensor_3d(context.get(), type, shape.hidden, shape.intermediate, shape.experts);
    up = ggml_new_tensor_3d(context.get(), type, shape.hidden, shape.intermediate, shape.experts);
    down = ggml_new_tensor_3d(context.get(), type, shape.intermediate, shape.hidden, shape.experts);
    ggml_backend_buffer_t buffer = allocate(buffer_type(backend, repack));
    if (!gate->extra && repack) {  // this CPU has no repacked form of the type: llama.cpp takes the plain one
      ggml_backend_buffer_free(buffer);
      for (ggml_tensor* tensor : {gate, up, down}) tensor->buffer = nullptr, tensor->data = nullptr;
      buffer = allocate(ggml_backend_get_default_buffer_type(backend));
    }
    auto base = reinterpret_cast<uintptr_t>(ggml_backend_buffer_get_base(buffer));
    const uintptr_t page = 4096, start = (base + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(start), ggml_backend_buffer_get_size(buffer) - (start - base), MADV_HUGEPAGE);
    unsigned seed = 7;
    for (ggml_tensor* tensor : {gate, up, down}) fill(tensor, seed++);
  }

  ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type) {
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(context.get(), type);
    if (!buffer) fail("no memory for the weights");
    return buffer;
  }

  static void fill(ggml_tensor* tensor, unsigned seed) {
    const int64_t columns = tensor->ne[0], rows = tensor->ne[1];
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(columns)));
    std::vector<float> values(static_cast<size_t>(columns * rows));
    for (float& value : values) value = normal(generator);
    std::vector<uint8_t> codes(ggml_nbytes(tensor));
    const size_t one = codes.size() / static_cast<size_t>(tensor->ne[2]);
    ggml_quantize_chunk(tensor->type, values.data(), codes.data(), 0, rows, columns, nullptr);
    for (int64_t e = 1; e < tensor->ne[2]; ++e) std::memcpy(codes.data() + e * one, codes.data(), one);
    ggml_backend_tensor_set(tensor, codes.data(), 0, codes.size());
  }
};

struct Result {
  double seconds, rms;
  int experts_hit;
};

// The layer's graph over `tokens` tokens; inputs are named for the caller to fill.
struct Graph {
  Context context = new_context();
  ggml_tensor *x, *ids, *weights, *out = nullptr;
  ggml_cgraph* graph;

  Graph(const Layer& layer, int64_t tokens) {
    ggml_context* c = context.get();
    const Shape& s = layer.shape;
    x = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.hidden, 1, tokens);
    ids = ggml_new_tensor_2d(c, GGML_TYPE_I32, s.top_k, tokens);
    weights = ggml_new_tensor_3d(c, GGML_TYPE_F32, 1, s.top_k, tokens);
    for (ggml_tensor* input : {x, ids, weights}) ggml_set_input(input);
    ggml_tensor* up = ggml_mul_mat_id(c, layer.up, x, ids);
    ggml_tensor* gate = ggml_mul_mat_id(c, layer.gate, x, ids);
    ggml_tensor* h = ggml_swiglu_split(c, gate, up);
    ggml_tensor* experts = ggml_mul(c, ggml_mul_mat_id(c, layer.down, h, ids), weights);
    for (int64_t rank = 0; rank < s.top_k; ++rank) {
      ggml_tensor* part =
          ggml_view_2d(c, experts, s.hidden, tokens, experts->nb[2], static_cast<size_t>(rank) * experts->nb[1]);
      out = rank ? ggml_add(c, out, part) : part;
    }
    ggml_set_output(out);
    graph = ggml_new_graph(c);
    ggml_build_forward_expand(graph, out);
  }
};

Result run(const Layer& layer, ggml_backend_t backend, ggml_gallocr_t memory, int64_t tokens, std::mt19937& generator) {
  Graph graph(layer, tokens);
  if (!ggml_gallocr_alloc_graph(memory, graph.graph)) fail("no memory for the activations");
  const Shape& s = layer.shape;
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<float> x(static_cast<size_t>(s.hidden * tokens)), weights(static_cast<size_t>(s.top_k * tokens));
  for (float& value : x) value = normal(generator);
  for (float& value : weights) value = uniform(generator);
  std::vector<int32_t> ids, order(static_cast<size_t>(s.experts));
  std::vector<bool> hit(static_cast<size_t>(s.experts));
  for (int64_t e = 0; e < s.experts; ++e) order[static_cast<size_t>(e)] = static_cast<int32_t>(e);
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t rank = 0; rank < s.top_k; ++rank) {
      std::uniform_int_distribution<int64_t> pick(rank, s.experts - 1);
      std::swap(order[static_cast<size_t>(rank)], order[static_cast<size_t>(pick(generator))]);
      ids.push_back(order[static_cast<size_t>(rank)]);
      hit[static_cast<size_t>(ids.back())] = true;
    }
  }
  ggml_backend_tensor_set(graph.x, x.data(), 0, ggml_nbytes(graph.x));
  ggml_backend_tensor_set(graph.ids, ids.data(), 0, ggml_nbytes(graph.ids));
  ggml_backend_tensor_set(graph.weights, weights.data(), 0, ggml_nbytes(graph.weights));
  const auto start = std::chrono::steady_clock::now();
  if (ggml_backend_graph_compute(backend, graph.graph) != GGML_STATUS_SUCCESS) fail("the graph failed");
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  ggml_backend_tensor_get(graph.out, x.data(), 0, x.size() * sizeof(float));
  double squares = 0;
  for (float value : x) squares += static_cast<double>(value) * value;
  int experts_hit = 0;
  for (bool is_hit : hit) experts_hit += is_hit;
  return {seconds.count(), std::sqrt(squares / static_cast<double>(x.size())), experts_hit};
}

}  // namespace

int main(int argc, char** argv) {
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  if (argc != 8) fail("usage: HIDDEN INTERMEDIATE EXPERTS TOP_K TYPE THREADS REPACK");
  const Shape shape = {std::atoll(argv[1]), std::atoll(argv[2]), std::atoll(argv[3]), std::atoll(argv[4])};
  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(backend, std::atoi(argv[6]));
  const Layer layer(shape, type_of(argv[5]), backend, std::atoi(argv[7]) != 0);
  ggml_gallocr_t memory = ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend));
  std::mt19937 generator(1);
  std::printf("ready\n");
  std::fflush(stdout);
  char line[64];
  while (std::fgets(line, sizeof line, stdin)) {
    const long tokens = std::atol(line);
    if (tokens < 1) fail("a line must be a number of tokens");
    run(layer, backend, memory, 1, generator);
    const Result result = run(layer, backend, memory, tokens, generator);
    std::printf("%.9f %d %.9g\n", result.seconds, result.experts_hit, result.rms);
    std::fflush(stdout);
  }
  return 0;
}
