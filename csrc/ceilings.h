// What this machine can do at best, measured by the engine's own threads: the two limits of the roofline.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.h"

namespace kt {

// Bytes per second at which the engine's threads together read `memory`, which must fit in no cache to mean anything:
// the best of several plain ways of reading, each tried twice.
double measure_bandwidth(Engine& engine, const uint8_t* memory, size_t bytes);

// The same over fresh memory of that size, in huge pages where the system grants them. Throws std::runtime_error when it
// cannot be had.
double measure_bandwidth(Engine& engine, size_t bytes);

// Operations per second (a multiply-add is two) of all threads together with operands in L1, in the blocking that a GEMM
// of this kernel table uses; the best of four windows of seconds / 4. bf16: of bf16 weights, else of int8.
double measure_compute(Engine& engine, double seconds, bool bf16);

}  // namespace kt
