#include "gemm.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace kt {
namespace {

// A block of activations must stay in L2 (2 MiB on Sapphire Rapids and later) beside two strips of weights and C.
constexpr size_t kActivationsInL2 = 1 << 20;
constexpr size_t kResultInL2 = 512 << 10;  // C of one unit of work
// K block of the large-M path: 16 k-steps. A block 512 rows x 1 KiB = 512 KiB, strip block 32 KiB (L1), C in L2.
constexpr int kBlockSteps = 16;
// Share of the next strip that later passes over this one ask for (the rest comes with its own first pass).
constexpr double kAheadShare = 0.375;

bool is_int4(const Weights& weights) { return weights.shape.info->k_group != 0; }

size_t steps_offset(const StripShape& shape, int step) {
  const int group = shape.info->k_group;
  if (group == 0) return static_cast<size_t>(step) * kStripStepBytes;
  return static_cast<size_t>(step / int4_block_steps(group)) * int4_block_bytes(group);
}

void run_tiles(const KernelTable& kernels, Arithmetic arithmetic, const TileArgs& args) {
  (arithmetic == Arithmetic::kBf16 ? kernels.tile_bf16 : kernels.tile_s8)(args);
}

void vector_strip(const KernelTable& kernels, Arithmetic arithmetic, const Weights& weights, int strip,
                  const Activations& a, void* c) {
  VecArgs args = {
      a.data, a.row_stride, a.sum, a.rows, weights.strip(strip), weights.shape.k_steps(), weights.shape.info->k_group,
      c,      false};
  if (arithmetic == Arithmetic::kFloat) {
    kernels.vec_bf16(args);
  } else if (is_int4(weights)) {
    kernels.vec_s4(args);
  } else {
    kernels.vec_s8(args);
  }
}

// The weights of k-steps [step, step + steps) of a strip as int8 or bf16 tiles: in place, or expanded from int4.
const uint8_t* tile_weights(const KernelTable& kernels, const Weights& weights, int strip, int step, int steps,
                            GemmScratch& scratch) {
  const uint8_t* at = weights.strip(strip) + steps_offset(weights.shape, step);
  if (!is_int4(weights)) return at;
  kernels.unpack_s4(at, steps, weights.shape.info->k_group, scratch.expanded.bytes());
  return scratch.expanded.bytes();
}

void whole_k(const KernelTable& kernels, Arithmetic arithmetic, const Weights& weights, int begin, int end,
             const Activations& a, const uint8_t* next, GemmScratch& scratch) {
  const int steps = weights.shape.k_steps();
  TileArgs args = {};
  args.a = a.data;
  args.a_tile_stride = static_cast<size_t>(steps) * a.tiling.tile_rows * kStepBytes;
  args.tiles = a.tiling.tiles;
  args.tile_rows = a.tiling.tile_rows;
  args.k_steps = steps;
  const size_t c_bytes = static_cast<size_t>(a.tiling.padded_rows()) * kStripCols * 4;
  args.from_memory = !is_int4(weights);  // int4 is expanded into L2 first
  const int passes = (args.tiles + 1) / 2;
  const int ahead_steps = passes > args.from_memory ? static_cast<int>(steps * kAheadShare) : 0;
  for (int strip = begin; strip < end; ++strip) {
    args.b = tile_weights(kernels, weights, strip, 0, steps, scratch);
    args.c = scratch.c.bytes() + (strip - begin) * c_bytes;
    args.prefetch_b = strip + 1 < end ? weights.strip(strip + 1) : next;
    args.prefetch_b_bytes = args.prefetch_b ? steps_offset(weights.shape, ahead_steps) : 0;
    run_tiles(kernels, arithmetic, args);
    args.prefetched_steps = args.prefetch_b ? ahead_steps : 0;
  }
}

// M x K does not fit in L2: keep C of this range of strips there instead and walk K in blocks.
void blocked_k(const KernelTable& kernels, Arithmetic arithmetic, const Weights& weights, int begin, int end,
               const Activations& a, GemmScratch& scratch) {
  const Tiling& tiling = a.tiling;
  const size_t step_bytes = static_cast<size_t>(tiling.padded_rows()) * kStepBytes;  // of A, all tiles
  const size_t c_bytes = static_cast<size_t>(tiling.padded_rows()) * kStripCols * 4;
  for (int step = 0; step < tiling.k_steps; step += tiling.block_steps) {
    const int now = std::min(tiling.block_steps, tiling.k_steps - step);
    const int later = std::min(tiling.block_steps, tiling.k_steps - step - now);
    TileArgs args = {};
    args.a = a.data + step * step_bytes;
    args.a_tile_stride = static_cast<size_t>(now) * tiling.tile_rows * kStepBytes;
    args.tiles = tiling.tiles;
    args.tile_rows = tiling.tile_rows;
    args.k_steps = now;
    args.accumulate = step > 0;
    // The next A block follows this one; every strip asks for its share of it.
    args.prefetch_a_bytes = round_up(later * step_bytes / (end - begin), 64);
    for (int strip = begin; strip < end; ++strip) {
      args.b = tile_weights(kernels, weights, strip, step, now, scratch);
      args.c = scratch.c.bytes() + (strip - begin) * c_bytes;
      const bool last = strip + 1 == end;
      const int next_step = last ? step + now : step;
      const size_t next_offset = steps_offset(weights.shape, next_step);
      args.prefetch_b = weights.strip(last ? begin : strip + 1) + next_offset;
      args.prefetch_b_bytes = steps_offset(weights.shape, next_step + (last ? later : now)) - next_offset;
      args.prefetch_a = args.a + now * step_bytes + (strip - begin) * args.prefetch_a_bytes;
      run_tiles(kernels, arithmetic, args);
    }
  }
}

// Hands C to the sink a few rows at a time, all strips of these rows together: rows of the output lie pages apart, so
// that going down one strip would cost a TLB miss for every 128 bytes.
void finish_rows(const StripSink& sink, int begin, int end, int rows, size_t c_bytes, const uint8_t* c) {
  constexpr int kRows = 8;
  for (int row = 0; row < rows; row += kRows) {
    EpilogueArgs at_row = sink.args;
    at_row.rows = std::min(kRows, rows - row);
    if (sink.prefetch && row + kRows < rows)
      sink.prefetch(sink, row + kRows, std::min(kRows, rows - row - kRows), begin, end);
    if (at_row.scale_a) at_row.scale_a += row;
    if (at_row.weight) at_row.weight += row;
    if (at_row.h) at_row.h += row * at_row.h_stride;
    if (at_row.token) {
      at_row.token += row;
    } else if (at_row.out) {
      at_row.out = static_cast<char*>(at_row.out) + row * at_row.out_stride * (sink.out_is_bf16 ? 2 : 4);
    }
    EpilogueArgs args = at_row;
    for (int strip = begin; strip < end; ++strip) {
      args.c = c + (strip - begin) * c_bytes + static_cast<size_t>(row) * kStripCols * 4;
      sink.finish(sink, at_row, strip, args);
    }
  }
}

}  // namespace

void Buffer::reserve(size_t bytes) {
  if (bytes <= bytes_) return;
  std::free(data_);
  data_ = nullptr;
  bytes_ = 0;
  const size_t wanted = round_up(bytes, 4096);
  data_ = std::aligned_alloc(4096, wanted);
  if (!data_) throw std::bad_alloc();
  bytes_ = wanted;
}

Tiling::Tiling(int rows, int steps) : k_steps(steps), block_steps(steps) {
  tiles = static_cast<int>(round_up(rows, kTileRows) / kTileRows);
  if (tiles > 1) tiles += tiles % 2;
  tile_rows = (rows + tiles - 1) / tiles;
  if (bytes() > kActivationsInL2) block_steps = std::min(steps, kBlockSteps);
}

void Tiling::scatter(const uint8_t* row, int r, uint8_t* tiles_out) const {
  const size_t step_bytes = static_cast<size_t>(tile_rows) * kStepBytes;
  for (int step = 0; step < k_steps; step += block_steps) {
    const int now = std::min(block_steps, k_steps - step);
    uint8_t* out = tiles_out + static_cast<size_t>(step) * padded_rows() * kStepBytes +
                   (r / tile_rows) * (now * step_bytes) + (r % tile_rows) * kStepBytes;
    for (int i = 0; i < now; ++i, out += step_bytes) std::memcpy(out, row + (step + i) * kStepBytes, kStepBytes);
  }
}

void reserve_gemm_scratch(GemmScratch& scratch, const StripShape& shape, int rows, int strips) {
  const Tiling tiling(rows, shape.k_steps());
  const size_t c_rows = std::max(rows, tiling.padded_rows());
  scratch.c.reserve(strips * c_rows * kStripCols * 4);
  if (shape.info->k_group) scratch.expanded.reserve(static_cast<size_t>(shape.k_steps()) * kStripStepBytes);
}

int strips_per_unit(int strips, int threads, int rows) {
  constexpr int kMost = 16, kUnitsPerThread = 4;
  const int fits = static_cast<int>(kResultInL2 / (static_cast<size_t>(rows) * kStripCols * 4));
  return std::max(1, std::min({kMost, fits, strips / (threads * kUnitsPerThread)}));
}

void gemm_strips(const KernelTable& kernels, Arithmetic arithmetic, const Weights& weights, int begin, int end,
                 const Activations& a, const uint8_t* next, GemmScratch& scratch, const StripSink& sink) {
  const size_t rows = static_cast<size_t>(a.tiled ? a.tiling.padded_rows() : a.rows);
  const size_t c_bytes = rows * kStripCols * 4;
  if (!a.tiled) {
    for (int strip = begin; strip < end; ++strip) {
      vector_strip(kernels, arithmetic, weights, strip, a, scratch.c.bytes() + (strip - begin) * c_bytes);
    }
  } else {
    kernels.tile_configure(a.tiling.tile_rows);
    if (a.tiling.blocked()) {
      blocked_k(kernels, arithmetic, weights, begin, end, a, scratch);
    } else {
      whole_k(kernels, arithmetic, weights, begin, end, a, next, scratch);
    }
  }
  finish_rows(sink, begin, end, a.rows, c_bytes, scratch.c.bytes());
}

}  // namespace kt
