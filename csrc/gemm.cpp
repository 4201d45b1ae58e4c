#include "gemm.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace kt {
namespace {

constexpr size_t kHugePage = 2 << 20;
// A block of activations must stay in L2 (2 MiB on Sapphire Rapids and later) beside two strips of weights and C.
constexpr size_t kActivationsInL2 = 1 << 20;
constexpr size_t kResultInL2 = 1 << 20;  // C of one run of strips
constexpr int kMostStrips = 16;
// K blocks: the block of a strip stays in L1 (48 KiB) for all rows. 8 k-steps (16 KiB) with C of one strip beside it;
// 16 (32 KiB) where C comes from L2 anyway and half as often is better.
constexpr int kBlockSteps = 8, kWideBlockSteps = 16;
// 3 and 4 row tiles: C of all of them stays in L1, too.
constexpr int kNarrowTiles = 4, kNarrowBlockSteps = 6;
// Block by block: divides the 112 k-steps of 7168 features. Weights that are expanded come in units of up to 4 k-steps (256
// inputs), which no K block may cut.
constexpr int kOuterBlockSteps = 14;
static_assert(kBlockSteps % 4 == 0 && kWideBlockSteps % 4 == 0, "K blocks of expanded weights");
// Up to so many row tiles the first pass over a block asks for its lines one k-step ahead; with more, all passes ask for
// the next block, evenly.
constexpr int kNearTiles = 2;

bool is_int4(const Weights& weights) { return weights.shape.info->k_group != 0; }
bool is_expanded(const Weights& weights) { return weights.shape.info->is_expanded(); }

size_t steps_offset(const StripShape& shape, int step) {
  if (shape.info->is_block()) {
    const int steps = block_inputs(shape.info->block_kind) / shape.info->k_per_step;
    return static_cast<size_t>(step / steps) * static_cast<size_t>(block_bytes(shape.info->block_kind));
  }
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
  if (arithmetic == Arithmetic::kBlocks) {
    kernels.blocks->vec(weights.shape.info->block_kind, args);
  } else if (arithmetic == Arithmetic::kFloat) {
    kernels.vec_bf16(args);
  } else if (is_int4(weights)) {
    kernels.vec_s4(args);
  } else {
    kernels.vec_s8(args);
  }
}

// The weights of k-steps [step, step + steps) of a strip as int8 or bf16 tiles: in place, or expanded.
const uint8_t* tile_weights(const KernelTable& kernels, const Weights& weights, int strip, int step, int steps,
                            GemmScratch& scratch) {
  const uint8_t* at = weights.strip(strip) + steps_offset(weights.shape, step);
  if (!is_expanded(weights)) return at;
  if (is_int4(weights)) {
    kernels.unpack_s4(at, steps, weights.shape.info->k_group, scratch.expanded.bytes());
  } else {
    kernels.blocks->expand_s8(weights.shape.info->block_kind, at, steps, weights.scales + strip * kStripCols,
                              scratch.expanded.bytes());
  }
  return scratch.expanded.bytes();
}

// Strip by strip, each through all K blocks.
void strip_by_strip(const KernelTable& kernels, Arithmetic arithmetic, const StripRun& run, const Activations& a,
                    const uint8_t* next, GemmScratch& scratch) {
  const Tiling& tiling = a.tiling;
  const StripShape& shape = run.first->shape;
  const size_t step_bytes = static_cast<size_t>(tiling.padded_rows()) * kStepBytes;  // of A, all tiles
  const size_t c_bytes = static_cast<size_t>(tiling.padded_rows()) * kStripCols * 4;
  TileArgs args = {};
  args.tiles = tiling.tiles;
  args.tile_rows = tiling.tile_rows;
  args.from_memory = tiling.tiles <= kNearTiles && !is_expanded(*run.first);
  for (int i = 0; i < run.size(); ++i) {
    args.c = scratch.c.bytes() + i * c_bytes;
    const uint8_t* next_strip = i + 1 < run.size() ? run.strip(i + 1) : next;
    for (int step = 0; step < tiling.k_steps; step += tiling.block_steps) {
      args.k_steps = std::min(tiling.block_steps, tiling.k_steps - step);
      const int later = std::min(tiling.block_steps, tiling.k_steps - step - args.k_steps);
      if (!args.from_memory) {
        const size_t offset = steps_offset(shape, step + args.k_steps);
        args.prefetch_b = later ? run.strip(i) + offset : next_strip;
        args.prefetch_b_bytes =
            later ? steps_offset(shape, step + args.k_steps + later) - offset : steps_offset(shape, tiling.block_steps);
      }
      args.a = a.data + step * step_bytes;
      args.b = tile_weights(kernels, run.weights(i), run.index(i), step, args.k_steps, scratch);
      args.accumulate = step > 0;
      run_tiles(kernels, arithmetic, args);
    }
  }
}

// M x K does not fit in L2: keep C of this run there instead and walk K in blocks.
void block_by_block(const KernelTable& kernels, Arithmetic arithmetic, const StripRun& run, const Activations& a,
                    GemmScratch& scratch) {
  const Tiling& tiling = a.tiling;
  const StripShape& shape = run.first->shape;
  const size_t step_bytes = static_cast<size_t>(tiling.padded_rows()) * kStepBytes;
  const size_t c_bytes = static_cast<size_t>(tiling.padded_rows()) * kStripCols * 4;
  for (int step = 0; step < tiling.k_steps; step += tiling.block_steps) {
    const int now = std::min(tiling.block_steps, tiling.k_steps - step);
    const int later = std::min(tiling.block_steps, tiling.k_steps - step - now);
    TileArgs args = {};
    args.a = a.data + step * step_bytes;
    args.tiles = tiling.tiles;
    args.tile_rows = tiling.tile_rows;
    args.k_steps = now;
    args.accumulate = step > 0;
    // The next A block follows this one; every strip asks for its share of it.
    args.prefetch_a_bytes = round_up(later * step_bytes / run.size(), 64);
    for (int i = 0; i < run.size(); ++i) {
      args.b = tile_weights(kernels, run.weights(i), run.index(i), step, now, scratch);
      args.c = scratch.c.bytes() + i * c_bytes;
      const bool last = i + 1 == run.size();
      const int next_step = last ? step + now : step;
      const size_t next_offset = steps_offset(shape, next_step);
      args.prefetch_b = run.strip(last ? 0 : i + 1) + next_offset;
      args.prefetch_b_bytes = steps_offset(shape, next_step + (last ? later : now)) - next_offset;
      args.prefetch_a = args.a + now * step_bytes + i * args.prefetch_a_bytes;
      run_tiles(kernels, arithmetic, args);
    }
  }
}

// Hands C to the sink a few rows at a time, all strips of these rows together: rows of the output lie pages apart, so
// that going down one strip would cost a TLB miss for every 128 bytes.
void finish_rows(const StripSink& sink, const StripRun& run, int rows, size_t c_bytes, const uint8_t* c) {
  constexpr int kRows = 8;
  for (int row = 0; row < rows; row += kRows) {
    EpilogueArgs at_row = sink.args;
    at_row.rows = std::min(kRows, rows - row);
    if (sink.prefetch && row + kRows < rows)
      sink.prefetch(sink, row + kRows, std::min(kRows, rows - row - kRows), run.begin, run.end);
    if (at_row.scale_a) at_row.scale_a += row;
    if (at_row.weight) at_row.weight += row, at_row.first += row;
    if (at_row.h) at_row.h += row * at_row.h_stride;
    if (at_row.token) {
      at_row.token += row;
    } else if (at_row.out) {
      at_row.out = static_cast<char*>(at_row.out) + row * at_row.out_stride * (sink.out_is_bf16 ? 2 : 4);
    }
    EpilogueArgs args = at_row;
    for (int i = 0; i < run.each(); ++i) {
      const uint8_t* at = c + static_cast<size_t>(row) * kStripCols * 4;
      args.c = at + i * c_bytes;
      if (run.second) args.c_up = at + (run.each() + i) * c_bytes;
      sink.finish(sink, at_row, run.begin + i, args);
    }
  }
}

}  // namespace

void Buffer::reserve(size_t bytes) {
  if (bytes <= bytes_) return;
  std::free(data_);
  data_ = nullptr;
  bytes_ = 0;
  // Large buffers in huge pages where the system gives them: rows and tiles lie pages apart.
  const size_t alignment = bytes >= kHugePage / 2 ? kHugePage : 4096;
  const size_t wanted = round_up(bytes, alignment);
  data_ = std::aligned_alloc(alignment, wanted);
  if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (alignment == kHugePage) madvise(data_, wanted, MADV_HUGEPAGE);
#endif
  bytes_ = wanted;
}

Tiling::Tiling(int rows, int steps, bool expanded) : k_steps(steps), block_steps(steps) {
  tiles = static_cast<int>(round_up(rows, kTileRows) / kTileRows);
  tile_rows = (rows + tiles - 1) / tiles;
  in_l2 = bytes() <= kActivationsInL2;
  if (!in_l2) {
    block_steps = std::min(steps, expanded ? kWideBlockSteps : kOuterBlockSteps);
  } else if (tiles > 2 || expanded) {
    const bool narrow = tiles <= kNarrowTiles && !expanded;
    block_steps = std::min(steps, narrow ? kNarrowBlockSteps : tiles > 8 ? kWideBlockSteps : kBlockSteps);
  }
}

void Tiling::scatter(const uint8_t* const* rows, int first, int count, uint8_t* tiles_out) const {
  const int pair = first / (2 * tile_rows);
  const int pair_rows = std::min(2 * tile_rows, padded_rows() - pair * 2 * tile_rows);  // the last may be a single tile
  const int in_pair = first - pair * 2 * tile_rows;
  const int together = std::min(count, pair_rows - in_pair);
  if (together < count) scatter(rows + together, first + together, count - together, tiles_out);
  for (int step = 0; step < k_steps; step += block_steps) {
    const int now = std::min(block_steps, k_steps - step);
    uint8_t* out = tiles_out + static_cast<size_t>(step) * padded_rows() * kStepBytes +
                   (static_cast<size_t>(pair) * 2 * tile_rows * now + in_pair) * kStepBytes;
    for (int i = step; i < step + now; ++i, out += static_cast<size_t>(pair_rows) * kStepBytes) {
      for (int r = 0; r < together; ++r) std::memcpy(out + r * kStepBytes, rows[r] + i * kStepBytes, kStepBytes);
    }
  }
}

void prefetch_added(const StripSink& sink, int first_row, int rows, int begin, int end) {
  const size_t bytes =
      static_cast<size_t>(std::min(end * kStripCols, sink.args.cols) - begin * kStripCols) * sizeof(float);
  for (int r = first_row; r < first_row + rows; ++r) {
    const char* at = reinterpret_cast<const char*>(static_cast<const float*>(sink.args.out) +
                                                   sink.args.token[r] * sink.args.out_stride + begin * kStripCols);
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 1);
  }
}

void reserve_gemm_scratch(GemmScratch& scratch, const StripShape& shape, int rows) {
  const Tiling tiling(rows, shape.k_steps(), shape.info->is_expanded());
  const size_t c_rows = std::max(rows, tiling.padded_rows());
  // A smaller segment takes more strips at a time: room for the most, whatever the rows.
  scratch.c.reserve(std::max(kResultInL2 + kMostStrips * kTileRows * kStripCols * 4, 2 * c_rows * kStripCols * 4));
  if (shape.info->is_expanded()) scratch.expanded.reserve(static_cast<size_t>(shape.k_steps()) * kStripStepBytes);
}

int most_strips(int rows) {
  const int fits = static_cast<int>(kResultInL2 / (static_cast<size_t>(rows) * kStripCols * 4));
  return std::max(1, std::min(kMostStrips, fits));
}

// Without all of the activations in L2 every run reads them again.
int least_strips(const Tiling& tiling) { return tiling.in_l2 ? 1 : std::min(4, most_strips(tiling.padded_rows())); }

void gemm_strips(const KernelTable& kernels, Arithmetic arithmetic, const StripRun& run, const Activations& a,
                 const uint8_t* next, GemmScratch& scratch, const StripSink& sink) {
  const size_t rows = static_cast<size_t>(a.tiled ? a.tiling.padded_rows() : a.rows);
  const size_t c_bytes = rows * kStripCols * 4;
  if (!a.tiled) {
    for (int i = 0; i < run.size(); ++i) {
      vector_strip(kernels, arithmetic, run.weights(i), run.index(i), a, scratch.c.bytes() + i * c_bytes);
    }
  } else {
    kernels.tile_configure(a.tiling.tile_rows);
    if (a.tiling.in_l2) {
      strip_by_strip(kernels, arithmetic, run, a, next, scratch);
    } else {
      block_by_block(kernels, arithmetic, run, a, scratch);
    }
  }
  finish_rows(sink, run, a.rows, c_bytes, scratch.c.bytes());
}

}  // namespace kt
