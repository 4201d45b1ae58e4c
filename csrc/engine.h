// What every layer of one model shares: the threads, the kernel table and the scratch memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "gemm.h"
#include "numa.h"
#include "thread_pool.h"

namespace kt {

// Units of one phase, handed out in order to whoever asks.
class UnitCounter {
 public:
  int take() { return next_.fetch_add(1, std::memory_order_relaxed); }
  void reset() { next_.store(0, std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int> next_{0};
};

// Strips of one phase in runs of shrinking length: long ones share what they read, short ones at the end let all workers
// finish together.
class StripCounter {
 public:
  struct Run {
    int begin, end;
  };

  // The next run of [0, total), empty when none is left. It has `least` to `most` strips, fewer where one of the pieces
  // of `piece` strips ends.
  Run take(int total, int piece, int workers, int least, int most) {
    int begin = next_.load(std::memory_order_relaxed);
    for (;;) {
      if (begin >= total) return {total, total};
      const int wanted = std::max(least, std::min(most, (total - begin) / (2 * workers)));
      const int end = std::min(begin + wanted, begin - begin % piece + piece);
      if (next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) return {begin, end};
    }
  }
  void reset() { next_.store(0, std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int> next_{0};
};

// Rows of activations in the forms the kernels want, one entry per token.
struct RowStage {
  Buffer int8;    // [rows][int8_stride]
  Buffer scale;   // [rows] float
  Buffer sum;     // [rows] int32
  Buffer bf16;    // [rows][wide_stride] uint16
  Buffer f32;     // [rows][wide_stride] float
  Buffer blocks;  // [rows][blocks_stride]
};

// Memory of one decode step (step.h), shared by all layers so that it stays in the cache.
struct StepScratch {
  Buffer normed;     // [rows][hidden_size]
  Buffer projected;  // what a first matrix gives: queries and latents, gate and up
  Buffer inner;      // between two matrices
  Buffer heads;      // the result of all heads
  Buffer out;        // [rows][hidden_size]
  Buffer routed;     // [rows][hidden_size]
  Buffer context;    // prefill: the context as tiles
  std::vector<Buffer> workers;
};

class Engine {
 public:
  // Throws std::invalid_argument for a bad thread count or isa name (empty: the best one). Nodes beyond the number of
  // threads are not used. Workers but the caller are bound to the CPUs of their node, if the OS lets them.
  Engine(int threads, const std::string& isa, NumaMode numa = NumaMode::kOff,
         const Topology& topology = system_topology());

  int threads() const { return pool_.size(); }
  const KernelTable& kernels() const { return kernels_; }
  ThreadPool& pool() { return pool_; }
  GemmScratch& gemm_scratch(int worker) { return gemm_[static_cast<size_t>(worker)]; }
  // One forward at a time uses the scratch, and one decode step, whose lock is taken before busy(). Both throw
  // std::runtime_error in a forked process, where a thread that is not there may hold them.
  std::mutex& busy() { return pool_.check_process(), busy_; }
  std::mutex& stepping() { return pool_.check_process(), stepping_; }

  // Scratch memory held now: what the largest forward and step so far needed.
  size_t scratch_bytes() const;

  // Workers worth waking for this many bytes of weights or arithmetic of that size.
  int workers_for(size_t weight_bytes, int rows) const;

  NumaMode numa() const { return numa_; }
  int nodes() const { return static_cast<int>(topology_.nodes.size()); }
  const Topology::Node& node(int index) const { return topology_.nodes[static_cast<size_t>(index)]; }
  // Workers go round the nodes, so that a job for a few of them uses all memory.
  int node_of(int worker) const { return worker % nodes(); }
  int workers_on(int node) const { return (threads() - node + nodes() - 1) / nodes(); }
  // The strips of a matrix that lie on a node, in proportion to its workers. Together: [0, strips), in order.
  StripCounter::Run share(int strips, int node) const;

  RowStage stage;
  Buffer tiles;        // activations of one group, cut into tiles or gathered
  Buffer hidden;       // float intermediate of one group
  Buffer hidden_rows;  // and quantised
  StepScratch step;

 private:
  static const KernelTable& select_table(const std::string& isa);

  const KernelTable& kernels_;
  const NumaMode numa_;
  const Topology topology_;
  ThreadPool pool_;
  std::vector<GemmScratch> gemm_;
  std::mutex busy_;
  std::mutex stepping_;
};

// Strips of one phase, several matrices side by side, for every worker the ones on its own node first.
class NodeStrips {
 public:
  struct Run {
    int matrix, begin, end;
  };

  Run take(const Engine& engine, int worker, int strips, int matrices, int workers, int least, int most) {
    const int nodes = engine.nodes(), beside = std::max(1, workers / nodes);
    for (int i = 0; i < nodes; ++i) {
      const int node = (engine.node_of(worker) + i) % nodes;
      const StripCounter::Run share = engine.share(strips, node);
      const int width = share.end - share.begin;
      if (width == 0) continue;
      const StripCounter::Run run = counters_[node].take(width * matrices, width, beside, least, most);
      if (run.begin == run.end) continue;
      const int begin = share.begin + run.begin % width;
      return {run.begin / width, begin, begin + run.end - run.begin};
    }
    return {0, 0, 0};
  }
  void reset() {
    for (StripCounter& counter : counters_) counter.reset();
  }

 private:
  StripCounter counters_[kMaxNodes];
};

}  // namespace kt
