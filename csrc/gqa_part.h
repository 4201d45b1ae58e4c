// Grouped-query attention to part of a context, and the contract between its step and an instruction set. Like kernels.h,
// nothing here allocates, throws or starts a thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

// Keys of one part: at a head size of 128 their keys and values take 256 KiB, which stays in the L2 cache while the queries
// of a group pass. A constant, so that sums do not depend on the number of threads.
constexpr int kPartKeys = 512;

// Keys and values of part of a context, bf16 rows `stride` numbers apart.
struct KeyRows {
  const uint16_t* keys;
  const uint16_t* values;
  size_t stride;
  int count;
};

// What part of a softmax says to the other parts: its largest logit, and the sum of e^(logit - largest).
struct PartialSoftmax {
  float largest;
  float total;
};

constexpr int kPartQueries = 16;

#if defined(__x86_64__)
size_t attend_part_scratch(size_t width);
// attend_part_bf16 of row_math.h for up to kPartQueries queries and kPartKeys keys, `width` a multiple of 32; queries and
// powers are rounded to bf16. scratch: attend_part_scratch() bytes, 64-byte aligned. Wants tiles configured for 16 rows.
void attend_part_amx(const float* queries, int count, size_t width, const KeyRows& rows, float scale, uint8_t* scratch,
                     float* out, PartialSoftmax* sums);
#endif

}  // namespace kt
