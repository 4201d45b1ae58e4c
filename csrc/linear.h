// A dense matrix on the CPU, repacked into strips: out = x * W^T.
#pragma once

#include <memory>

#include "engine.h"
#include "quantize.h"
#include "rows.h"

namespace kt {

// Where a product goes: rows `stride` elements apart, stored there or (float) added to what is there.
struct LinearOut {
  void* data;
  size_t stride;
  bool is_bf16 = false;
  bool adds = false;
};

class PackedLinear {
 public:
  // codes: row-major as quantize.h writes them (bf16: the weights themselves); row_scale [n], null for bf16.
  PackedLinear(std::shared_ptr<Engine> engine, Format format, const CodeView& codes, const float* row_scale);

  // A block format. rows: n rows of k weights as ggml stores them. Throws std::invalid_argument for a k that does not fill whole
  // blocks and for a scale that is NaN or inf, naming row and column.
  PackedLinear(std::shared_ptr<Engine> engine, Format format, const uint8_t* rows, int n, int k);

  int out_features() const { return weights_.shape.n; }
  int in_features() const { return weights_.shape.k; }
  size_t nbytes() const;

  void forward(const Input& x, const LinearOut& out);

  // Whether forward_gated can: both of one format and shape, or one matrix that is both; whole strips of each.
  static bool can_gate(const PackedLinear& gate, const PackedLinear* up);
  // out [x.rows, inner] = silu(gate) * up of x, in one pass. up null: the first half of `gate`'s outputs is the gate and the
  // second is up. Only where can_gate().
  static void forward_gated(const PackedLinear& gate, const PackedLinear* up, const Input& x, float* out);

 private:
  void reserve();  // strips and scales of zeros
  // fill(strip, column in it, row, scratch) for every row, strips spread over the workers.
  template <typename Fill>
  void fill_strips(const Fill& fill);
  // Strips of one or two matrices times at most 512 rows, each finished as the sink says.
  static void multiply(Engine& engine, const Weights& first, const Weights* second, const Input& x, StripSink sink);

  std::shared_ptr<Engine> engine_;
  Buffer strips_;
  Buffer scales_;
  Weights weights_;
};

}  // namespace kt
