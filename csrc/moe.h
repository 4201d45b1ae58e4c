// The routed experts of one MoE layer: y[t] = sum over r of w[t, r] * down_e(silu(gate_e(x_t)) * up_e(x_t)), e = ids[t, r];
// with biases and another gate where set_biases and set_gate say so.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine.h"
#include "layout.h"
#include "rows.h"

namespace kt {

struct ExpertBlob {
  ExpertFormat format;
  const uint8_t* data;  // ExpertShape::blob_bytes() bytes, 64-byte aligned, owned by the caller
};

struct Routing {
  const int64_t* ids;    // [tokens, k]; -1: none
  const float* weights;  // [tokens, k]
  int k;
};

class ExpertLayer {
 public:
  // Throws std::invalid_argument on sizes or alignment that cannot be, std::bad_alloc for copies that do not fit.
  ExpertLayer(std::shared_ptr<Engine> engine, int hidden_size, int moe_intermediate_size,
              std::vector<ExpertBlob> experts);

  int num_experts() const { return static_cast<int>(experts_.size()); }
  int hidden_size() const { return hidden_size_; }
  int moe_intermediate_size() const { return intermediate_; }

  // Bytes of weights that each node of the engine multiplies (kReplicate: holds).
  std::vector<size_t> node_bytes() const;
  // Brings an expert's weights into memory, every node's from its own threads; on one node from the calling thread, beside
  // whatever the engine computes. Without it they come as they are used.
  void make_resident(int expert);

  // gate, up [num_experts, moe_intermediate_size], down [num_experts, hidden_size]: added to the matrices' outputs.
  void set_biases(const float* gate, const float* up, const float* down);
  void set_gate(const GateShape& gate);

  // out: [x.rows, hidden_size] float, overwritten. Throws std::invalid_argument for ids outside [-1, num_experts); then
  // out is untouched. The result does not depend on the number of threads.
  void forward(const Input& x, const Routing& routing, float* out);

 private:
  struct Expert {
    Weights gate_up;
    Weights down;
  };
  struct Segment;
  struct Plan;

  // An odd number of cache lines, so that rows do not all fall into the same cache sets.
  size_t hidden_row_floats() const { return f32_stride(intermediate_) / sizeof(float) / 32 * 32 + 16; }
  size_t gate_up_bias_width() const { return round_up(static_cast<size_t>(intermediate_), kTileCols) * 2; }
  size_t down_bias_width() const { return round_up(static_cast<size_t>(hidden_size_), kStripCols); }
  static Expert expert_at(const ExpertBlob& blob, int hidden_size, int moe_intermediate_size);
  void replicate(const std::vector<ExpertBlob>& experts);
  const std::vector<Expert>& experts_for(int worker) const {
    return node_experts_.empty() ? experts_ : node_experts_[static_cast<size_t>(engine_->node_of(worker))];
  }
  void check_ids(const Routing& routing, int tokens) const;
  Plan make_plan(const Input& x, const Routing& routing) const;
  void forward_chunk(const Input& x, const Routing& routing, float* out);
  void gather_rows(Plan& plan, int begin, int end);
  void convert_hidden(Plan& plan, int group, int begin, int end, GemmScratch& scratch);
  void run_group(Plan& plan, int first, int last, int worker, struct GroupSync& sync, float* out);

  std::shared_ptr<Engine> engine_;
  int hidden_size_;
  int intermediate_;
  std::vector<Expert> experts_;                    // over the caller's blobs
  std::vector<std::vector<Expert>> node_experts_;  // kReplicate: over each node's copy
  std::vector<Buffer> copies_;
  std::vector<float> gate_up_bias_;  // [experts][strips][32], in the columns of the strips; empty: none
  std::vector<float> down_bias_;     // [experts][hidden_size to whole strips]
  GateShape gate_;
  bool is_plain_gate_ = true;
};

}  // namespace kt
