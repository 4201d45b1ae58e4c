#include "gemm.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace kt {
namespace {

constexpr size_t kHugePage = 2 << 20;
// Activations that must stay in L2 (2 MiB on Sapphire Rapids and later) beside C and the weights that pass.
constexpr size_t kActivationsInL2 = 1 << 20;
constexpr size_t kResultInL2 = 1 << 20;  // C of one run of strips
constexpr int kMostStrips = 16;
// K blocks: the block of a strip (16 KiB) stays in L1 (48 KiB) for all rows, beside C of two tiles and what was asked for of the
// next block. Twice that where expanding weights should be shared by more rows; 14 k-steps where C of a whole run comes and goes
// with every block.
constexpr int kBlockSteps = 8, kWideBlockSteps = 16, kOuterBlockSteps = 14;
constexpr int kWideTiles = 9;  // from so many row tiles on, expanded weights come in wide blocks
// A core follows up to 32 streams and reads each some 20 lines ahead, within a page of 4 KiB. One stream is behind the
// tiles again before memory answers; of eight, most lines are in L2 when they are asked for, and reading hides behind dot products.
constexpr int kStreams = 8, kExpandedStreams = 4, kOuterStreams = 2;
// Up to so many row tiles the first pass over a block asks for its lines one k-step ahead; with more, all passes ask for
// the next block, evenly.
constexpr int kNearTiles = 2;

bool is_int4(const Weights& weights) { return weights.shape.info->k_group != 0; }
bool is_expanded(const Weights& weights) { return weights.shape.info->is_expanded(); }

// Where the K block at `place` begins in a strip, and how far apart its streams are.
size_t place_offset(const StripShape& shape, const Tiling& tiling, int place) {
  return static_cast<size_t>(tiling.step_at(place) / tiling.unit_steps) * shape.info->unit_bytes();
}

BStreams stored_streams(const StripShape& shape, const Tiling& tiling) {
  const int units = tiling.k_steps / tiling.unit_steps;
  return {tiling.streams, static_cast<size_t>(units / tiling.streams) * shape.info->unit_bytes()};
}

size_t steps_bytes(const StripShape& shape, const Tiling& tiling, int steps) {
  return static_cast<size_t>(steps / tiling.unit_steps) * shape.info->unit_bytes();
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

TileArgs tile_args(const Tiling& tiling, const StripShape& shape) {
  TileArgs args = {};
  args.tiles = tiling.tiles;
  args.tile_rows = tiling.tile_rows;
  args.prefetch_streams = stored_streams(shape, tiling);
  args.streams = shape.info->is_expanded() ? BStreams{1, 0} : args.prefetch_streams;
  return args;
}

// The `steps` k-steps of a K block as int8 or bf16 tiles: in place, or expanded unit by unit.
void set_weights(const KernelTable& kernels, const Weights& weights, int strip, const Tiling& tiling, int place,
                 int steps, GemmScratch& scratch, TileArgs& args) {
  const FormatInfo& info = *weights.shape.info;
  const uint8_t* stored = weights.strip(strip) + place_offset(weights.shape, tiling, place);
  args.k_steps = steps;
  args.b = info.is_expanded() ? scratch.expanded.bytes() : stored;
  if (!info.is_expanded()) return;
  uint8_t* out = scratch.expanded.bytes();
  for (int unit = 0; unit < steps / tiling.unit_steps; ++unit, out += tiling.unit_steps * kStripStepBytes) {
    const uint8_t* at =
        stored + unit % tiling.streams * args.prefetch_streams.stride + unit / tiling.streams * info.unit_bytes();
    if (info.is_block()) {
      kernels.blocks->expand_s8(info.block_kind, at, tiling.unit_steps, weights.scales + strip * kStripCols, out);
    } else {
      kernels.unpack_s4(at, tiling.unit_steps, info.k_group, out);
    }
  }
}

// Strip by strip, each through all K blocks.
void strip_by_strip(const KernelTable& kernels, Arithmetic arithmetic, const StripRun& run, const Activations& a,
                    const uint8_t* next, GemmScratch& scratch) {
  const Tiling& tiling = a.tiling;
  const StripShape& shape = run.first->shape;
  const size_t step_bytes = static_cast<size_t>(tiling.padded_rows()) * kStepBytes;  // of A, all tiles
  const size_t c_bytes = static_cast<size_t>(tiling.padded_rows()) * kStripCols * 4;
  TileArgs args = tile_args(tiling, shape);
  args.from_memory = tiling.tiles <= kNearTiles && !is_expanded(*run.first);
  for (int i = 0; i < run.size(); ++i) {
    args.c = scratch.c.bytes() + i * c_bytes;
    const uint8_t* next_strip = i + 1 < run.size() ? run.strip(i + 1) : next;
    for (int place = 0; place < tiling.k_steps; place += tiling.block_steps) {
      const int now = std::min(tiling.block_steps, tiling.k_steps - place);
      const int later = std::min(tiling.block_steps, tiling.k_steps - place - now);
      if (!args.from_memory) {
        args.prefetch_b = later ? run.strip(i) + place_offset(shape, tiling, place + now) : next_strip;
        args.prefetch_b_bytes = steps_bytes(shape, tiling, later ? later : tiling.block_steps);
      }
      args.a = a.data + place * step_bytes;
      args.accumulate = place > 0;
      set_weights(kernels, run.weights(i), run.index(i), tiling, place, now, scratch, args);
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
  TileArgs args = tile_args(tiling, shape);
  for (int place = 0; place < tiling.k_steps; place += tiling.block_steps) {
    const int now = std::min(tiling.block_steps, tiling.k_steps - place);
    const int later = std::min(tiling.block_steps, tiling.k_steps - place - now);
    args.a = a.data + place * step_bytes;
    args.accumulate = place > 0;
    // The next A block follows this one; every strip asks for its share of it.
    args.prefetch_a_bytes = round_up(later * step_bytes / run.size(), 64);
    for (int i = 0; i < run.size(); ++i) {
      args.c = scratch.c.bytes() + i * c_bytes;
      const bool last = i + 1 == run.size();
      args.prefetch_b = last && !later
                            ? nullptr
                            : run.strip(last ? 0 : i + 1) + place_offset(shape, tiling, last ? place + now : place);
      args.prefetch_b_bytes = steps_bytes(shape, tiling, last ? later : now);
      args.prefetch_a = args.a + now * step_bytes + i * args.prefetch_a_bytes;
      set_weights(kernels, run.weights(i), run.index(i), tiling, place, now, scratch, args);
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

Tiling::Tiling(int rows, const StripShape& weights)
    : k_steps(weights.k_steps()), block_steps(k_steps), streams(1), unit_steps(weights.info->unit_steps()) {
  const bool expanded = weights.info->is_expanded();
  tiles = static_cast<int>(round_up(rows, kTileRows) / kTileRows);
  tile_rows = (rows + tiles - 1) / tiles;
  in_l2 = bytes() <= kActivationsInL2;
  if (in_l2 && tiles <= kNearTiles && !expanded) return;  // one pass over a strip: memory order
  const int narrow = in_l2 ? kBlockSteps : kOuterBlockSteps;
  const int steps = !expanded || (in_l2 && tiles < kWideTiles) ? narrow : kWideBlockSteps;
  // Sums of floats keep K's order: a row's bits do not depend on how many rows there are.
  const int most = weights.info->format == Format::kBf16 ? 1
                   : expanded                            ? kExpandedStreams
                   : in_l2                               ? kStreams
                                                         : kOuterStreams;
  const int units = k_steps / unit_steps;
  for (streams = std::max(1, std::min(most, steps / unit_steps)); units % streams != 0;) --streams;
  const int row_steps = streams * unit_steps;
  block_steps = std::min(k_steps, steps / row_steps * row_steps);
}

int Tiling::step_at(int place) const {
  const int unit = place / unit_steps, units = k_steps / unit_steps;
  return (unit % streams * (units / streams) + unit / streams) * unit_steps + place % unit_steps;
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
      const int from = step_at(i);
      for (int r = 0; r < together; ++r) std::memcpy(out + r * kStepBytes, rows[r] + from * kStepBytes, kStepBytes);
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
  const Tiling tiling(rows, shape);
  const size_t c_rows = std::max(rows, tiling.padded_rows());
  // A smaller segment takes more strips at a time: room for the most, whatever the rows.
  scratch.c.reserve(std::max(kResultInL2 + kMostStrips * kTileRows * kStripCols * 4, 2 * c_rows * kStripCols * 4));
  if (shape.info->is_expanded()) scratch.expanded.reserve(kWideBlockSteps * kStripStepBytes);
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
