// Tensors of strangers, for builds with sanitizers: whatever bytes a file's blocks hold, the decoders of ggml's types and of FP8
// read and write inside exactly sized memory only. Prints "ok"; the numbers are looked at by test_dequantize.py.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "dequantize.h"
#include "dequantize_codebook.h"

namespace {

constexpr int kBlocks = 67;

enum class Filling { kNoise, kOnes, kZeros };
constexpr Filling kFillings[] = {Filling::kNoise, Filling::kOnes, Filling::kZeros};

// On the heap, so that a byte beyond is seen.
std::unique_ptr<uint8_t[]> bytes(size_t count, Filling filling) {
  std::unique_ptr<uint8_t[]> data(new uint8_t[count]);
  std::mt19937 random(static_cast<unsigned>(count));
  for (size_t i = 0; i < count; ++i) {
    data[i] = filling == Filling::kNoise ? static_cast<uint8_t>(random()) : filling == Filling::kOnes ? 0xFF : 0;
  }
  return data;
}

void decode(const kt::GgmlType& type, Filling filling) {
  const auto data = bytes(kBlocks * static_cast<size_t>(type.bytes), filling);
  std::unique_ptr<float[]> out(new float[kBlocks * static_cast<size_t>(type.block)]);
  type.decode(data.get(), kBlocks, out.get());
}

void decode(const kt::CodebookType& type, Filling filling) {
  const auto data = bytes(kBlocks * static_cast<size_t>(type.bytes), filling);
  const size_t size = static_cast<size_t>(type.grid_rows) * static_cast<size_t>(type.grid_columns);
  std::unique_ptr<int8_t[]> grid(new int8_t[size]());
  std::unique_ptr<float[]> out(new float[kBlocks * static_cast<size_t>(kt::kCodebookBlock)]);
  type.decode(data.get(), kBlocks, grid.get(), out.get());
}

void decode_fp8(size_t rows, size_t cols, size_t block_rows, size_t block_cols, size_t first_row, Filling filling) {
  const auto codes = bytes(rows * cols, filling);
  const size_t down = (first_row + rows + block_rows - 1) / block_rows, across = (cols + block_cols - 1) / block_cols;
  std::unique_ptr<float[]> scales(new float[down * across]());
  std::unique_ptr<uint16_t[]> out(new uint16_t[rows * cols]);
  kt::decode_fp8({codes.get(), scales.get(), rows, cols, block_rows, block_cols, first_row}, out.get());
}

}  // namespace

int main() {
  for (Filling filling : kFillings) {
    for (const kt::GgmlType& type : kt::ggml_types()) decode(type, filling);
    for (const kt::CodebookType& type : kt::codebook_types()) decode(type, filling);
    for (size_t rows : {1, 127, 128, 129}) {
      for (size_t cols : {1, 127, 129, 300}) {
        for (size_t first : {0, 1, 127}) decode_fp8(rows, cols, 128, 128, first, filling);
        decode_fp8(rows, cols, 3, 50, 2, filling);
      }
    }
  }
  std::printf("ok\n");
  return 0;
}
