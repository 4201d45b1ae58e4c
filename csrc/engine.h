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
  Buffer int8;   // [rows][int8_stride]
  Buffer scale;  // [rows] float
  Buffer sum;    // [rows] int32
  Buffer bf16;   // [rows][wide_stride] uint16
  Buffer f32;    // [rows][wide_stride] float
};

// Memory of one decode step (step.h), shared by all layers so that it stays in the cache.
struct StepScratch {
  Buffer normed;     // [rows][hidden_size]
  Buffer projected;  // what a first matrix gives: queries and latents, gate and up
  Buffer inner;      // between two matrices
  Buffer heads;      // the result of all heads
  Buffer out;        // [rows][hidden_size]
  Buffer routed;     // [rows][hidden_size]
  std::vector<Buffer> workers;
};

class Engine {
 public:
  // Throws std::invalid_argument for a bad thread count or isa name (empty: the best one).
  Engine(int threads, const std::string& isa) : kernels_(select_table(isa)), pool_(threads), gemm_(pool_.size()) {
    step.workers.resize(static_cast<size_t>(pool_.size()));
  }

  int threads() const { return pool_.size(); }
  const KernelTable& kernels() const { return kernels_; }
  ThreadPool& pool() { return pool_; }
  GemmScratch& gemm_scratch(int worker) { return gemm_[static_cast<size_t>(worker)]; }
  std::mutex& busy() { return busy_; }          // one forward at a time uses the scratch
  std::mutex& stepping() { return stepping_; }  // and one decode step; taken before busy()

  // Workers worth waking for this many bytes of weights or arithmetic of that size.
  int workers_for(size_t weight_bytes, int rows) const;

  RowStage stage;
  Buffer tiles;        // activations of one group, cut into tiles or gathered
  Buffer hidden;       // float intermediate of one group
  Buffer hidden_rows;  // and quantised
  StepScratch step;

 private:
  static const KernelTable& select_table(const std::string& isa);

  const KernelTable& kernels_;
  ThreadPool pool_;
  std::vector<GemmScratch> gemm_;
  std::mutex busy_;
  std::mutex stepping_;
};

}  // namespace kt
