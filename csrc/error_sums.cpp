#include "error_sums.h"

#include <cstring>
#include <vector>

#include "clones.h"

#define KT_INLINE inline __attribute__((always_inline))

namespace kt {
namespace {

constexpr size_t kLanes = 8;
using Floats = float __attribute__((vector_size(32)));
using Doubles = double __attribute__((vector_size(64)));

KT_INLINE void add_squares(const Floats& x, Doubles& sum) {
  const Doubles wide = __builtin_convertvector(x, Doubles);
  sum += wide * wide;
}

KT_INLINE double total(const Doubles& lanes) {
  double sum = 0.0;
  for (size_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

}  // namespace

KT_CLONES void add_errors(const float* source, const float* stored, size_t n, ErrorSums& sums) {
  Doubles squares = {}, stored_squares = {}, errors = {};
  Floats largest = {};
  for (size_t i = 0; i < n; i += kLanes) {
    Floats a = {}, b = {};
    const size_t bytes = (n - i < kLanes ? n - i : kLanes) * sizeof(float);
    if (bytes == sizeof a) {
      std::memcpy(&a, source + i, sizeof a);
      std::memcpy(&b, stored + i, sizeof b);
    } else {
      std::memcpy(&a, source + i, bytes);
      std::memcpy(&b, stored + i, bytes);
    }
    const Floats error = a - b, negative = -error;
    add_squares(a, squares);
    add_squares(b, stored_squares);
    add_squares(error, errors);
    largest = error > largest ? error : largest;
    largest = negative > largest ? negative : largest;
  }
  sums.source_square += total(squares);
  sums.stored_square += total(stored_squares);
  sums.error_square += total(errors);
  for (size_t i = 0; i < kLanes; ++i) {
    if (largest[i] > sums.max_abs_error) sums.max_abs_error = largest[i];
  }
}

void expert_errors(Format format, const uint8_t* blob, const MatrixView& gate, const MatrixView& up,
                   const MatrixView& down, ErrorSums* sums) {
  const ExpertShape shape(format, gate.cols, gate.rows);
  const MatrixView matrices[] = {gate, up, down};
  const auto width = static_cast<size_t>(gate.cols > down.cols ? gate.cols : down.cols);
  std::vector<float> source(width), stored(width);
  for (int m = 0; m < 3; ++m) {
    sums[m] = {};
    for (int r = 0; r < matrices[m].rows; ++r) {
      matrices[m].row(r, source.data());
      unpack_row(shape, blob, static_cast<ExpertMatrix>(m), r, stored.data());
      add_errors(source.data(), stored.data(), static_cast<size_t>(matrices[m].cols), sums[m]);
    }
  }
}

}  // namespace kt
