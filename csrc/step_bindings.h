// Python's view of step.h, latent_step.h and router.h.
#pragma once

#include <vector>

#include "arrays.h"
#include "moe.h"

namespace kt {

// A layer and the arrays it reads in place: these very arrays, whatever becomes of the list they came in.
struct LayerOverBlobs {
  std::vector<py::array> blobs;
  ExpertLayer layer;
};

void bind_steps(py::module_& m);

}  // namespace kt
