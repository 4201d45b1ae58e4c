#pragma once

#include <optional>

#include "arrays.h"
#include "router.h"

namespace kt {

// Where a router writes: ids and weights [rows, router.width(rule)], scores [rows, k] or nothing, and nothing with a rule.
TokenChoice choice_of(const Router& router, int rows, py::array& ids, py::array& weights,
                      std::optional<py::array>& scores, const ExpertRule* rule);

void bind_router(py::module_& m);

}  // namespace kt
