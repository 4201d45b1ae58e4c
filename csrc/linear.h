// A dense matrix on the CPU, repacked into strips: out = x * W^T.
#pragma once

#include <memory>

#include "engine.h"
#include "quantize.h"
#include "rows.h"

namespace kt {

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

  // out [x.rows, n], float or bf16.
  void forward(const Input& x, void* out, bool out_is_bf16);

 private:
  void reserve();  // strips and scales of zeros
  // fill(strip, column in it, row, scratch) for every row, strips spread over the workers.
  template <typename Fill>
  void fill_strips(const Fill& fill);
  void forward_rows(const Input& x, uint8_t* out, bool out_is_bf16);

  std::shared_ptr<Engine> engine_;
  Buffer strips_;
  Buffer scales_;
  Weights weights_;
};

}  // namespace kt
