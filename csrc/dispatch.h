// The kernel tables compiled into this build, best first, and the choice among them.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace kt {

struct IsaStatus {
  const KernelTable* table;
  std::vector<std::string> missing;  // features this CPU lacks; empty: it runs here
};

const std::vector<IsaStatus>& isa_status();

// The named table, or the best one for an empty name. Throws std::invalid_argument, listing the valid names, when it is
// unknown or does not run here.
const KernelTable& select_isa(const std::string& name);

}  // namespace kt
