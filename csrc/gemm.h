// Blocking of one GEMM over strips, for the expert layer and for dense matrices alike. No ISA, no threads: the caller
// gives a range of strips, the kernel table does the arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "kernels.h"
#include "layout.h"
#include "row_math.h"

namespace kt {

// Grow-only, 64-byte aligned memory, reused from call to call.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
    other.bytes_ = 0;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Content is undefined after growth. Throws std::bad_alloc.
  void reserve(size_t bytes);
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  uint8_t* bytes() const { return as<uint8_t>(); }
  size_t capacity() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// How activations are multiplied with weights of a format.
enum class Arithmetic {
  kInt8,    // int8 x int8 (or int4) -> int32
  kBf16,    // bf16 x bf16 -> float: tiles only
  kFloat,   // float x bf16 -> float: vector kernels only
  kBlocks,  // int8 in blocks x block formats -> float: vector kernels only
};

// How `rows` rows are cut into tiles of equal height, and K into blocks. Two tiles share their B tiles; the last may be
// alone. The units of a strip (layout.h) form `streams` of equal length, which K blocks walk side by side: their first
// units, then their second ones. Memory order: [K block][pair of tiles][k-step][row of the pair][64 B].
struct Tiling {
  int tiles;
  int tile_rows;
  int k_steps;
  int block_steps;  // whole units of all streams
  int streams;
  int unit_steps;
  bool in_l2;  // all of K at once; else K blocks go by while C waits in L2

  Tiling() = default;
  Tiling(int rows, const StripShape& weights);
  int padded_rows() const { return tiles * tile_rows; }
  size_t bytes() const { return static_cast<size_t>(padded_rows()) * k_steps * kStepBytes; }
  // Where the k-step at this place of the order above is in a row or, if it begins a unit, in a strip.
  int step_at(int place) const;
  // Copies rows [first, first + count), k_steps x 64 bytes each, to their places.
  void scatter(const uint8_t* const* rows, int first, int count, uint8_t* tiles_out) const;
};

// The rows of one GEMM: row-major and zero-padded to whole k-steps, or cut into tiles.
struct Activations {
  const uint8_t* data;
  size_t row_stride;  // bytes; row-major only
  int rows;
  const int32_t* sum;  // kInt8, row-major only: per row
  bool tiled;
  Tiling tiling;
};

struct Weights {
  StripShape shape;
  const uint8_t* strips;
  const float* scales;  // [strips][32]; null for bf16

  const uint8_t* strip(int i) const { return strips + static_cast<size_t>(i) * shape.strip_bytes(); }
};

constexpr int kGatherRows = 16;  // rows that go into tiles together: their lines lie side by side there

// Per-thread memory of the GEMM: C of a run and a K block of expanded weights.
struct GemmScratch {
  Buffer c;
  Buffer expanded;
  Buffer rows;  // kGatherRows converted rows on their way into tiles
};

// Strips [begin, end) of one matrix, or of two of the same shape: all of the first, then all of the second.
struct StripRun {
  const Weights* first;
  const Weights* second;  // may be null
  int begin, end;

  int each() const { return end - begin; }
  int size() const { return second ? 2 * each() : each(); }
  const Weights& weights(int i) const { return i < each() ? *first : *second; }
  int index(int i) const { return begin + (i < each() ? i : i - each()); }
  const uint8_t* strip(int i) const { return weights(i).strip(index(i)); }
};

// Does something with finished strips, some rows of one strip at a time. `rows` describes these rows at strip 0; finish sets
// what depends on the strip (scale_b, h, out, cols) in `args`, a copy of rows whose c is already right, and runs the
// epilogue. Of a run over two matrices c_up is set, too. In place, because passing the struct by value stalls on store forwarding (a seventh of the time at 4096 tokens).
struct StripSink {
  void (*finish)(const StripSink& sink, const EpilogueArgs& rows, int strip, EpilogueArgs& args);
  void (*prefetch)(const StripSink& sink, int first_row, int rows, int begin, int end);  // may be null
  const KernelTable* kernels;
  Arithmetic arithmetic;
  EpilogueArgs args;  // of row 0 and strip 0; cols: of the whole matrix
  bool out_is_bf16 = false;
  const float* bias = nullptr;      // of the strips' columns, [strips][32]
  const GateShape* gate = nullptr;  // null: silu(gate) * up without biases, in the kernel table
};

// For sinks that add: the output rows about to be added to, long since out of the caches when many tokens go by.
void prefetch_added(const StripSink& sink, int first_row, int rows, int begin, int end);

// Strips times the activations, each handed to the sink. `next`: memory wanted after this run.
void gemm_strips(const KernelTable& kernels, Arithmetic arithmetic, const StripRun& run, const Activations& a,
                 const uint8_t* next, GemmScratch& scratch, const StripSink& sink);

// Makes scratch large enough for gemm_strips over max(2, most_strips()) strips at a time. rows: of the largest Activations.
void reserve_gemm_scratch(GemmScratch& scratch, const StripShape& shape, int rows);

// The longest and shortest run of strips that one worker should take at a time, for so many rows.
int most_strips(int rows);
int least_strips(const Tiling& tiling);

}  // namespace kt
