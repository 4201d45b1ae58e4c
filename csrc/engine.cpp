#include "engine.h"

#include <algorithm>

#include "dispatch.h"

namespace kt {

const KernelTable& Engine::select_table(const std::string& isa) { return select_isa(isa); }

int Engine::workers_for(size_t weight_bytes, int rows) const {
  // Waking a worker costs about 2 us; a core reads 32 KiB of weights in that time, or multiplies them with 16 rows.
  constexpr size_t kBytesPerWorker = 64 << 10;
  const size_t work = weight_bytes * static_cast<size_t>(std::max(1, rows / 16));
  return static_cast<int>(std::clamp<size_t>(work / kBytesPerWorker, 1, static_cast<size_t>(threads())));
}

}  // namespace kt
