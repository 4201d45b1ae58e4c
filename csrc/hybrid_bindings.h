// Python's view of expert_queue.h, sim_stream.h and cuda_host.h.
#pragma once

#include "arrays.h"

namespace kt {

void bind_hybrid(py::module_& m);

}  // namespace kt
