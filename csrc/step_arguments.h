// Arguments that the bindings of all steps take, checked and turned into C++.
#pragma once

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "step.h"

namespace kt {

using NormArgs = std::pair<py::array, float>;  // sqrt(n) weight, n eps
using Linears = std::vector<py::object>;       // one or two PackedLinears

// Something that points into Python objects, and these objects.
template <typename T>
struct Over {
  std::vector<py::object> kept;
  T value;
};

template <typename T>
std::unique_ptr<Over<T>> keep(std::vector<py::object> kept, T value) {
  return std::unique_ptr<Over<T>>(new Over<T>{std::move(kept), std::move(value)});
}

inline Norm norm_of(const NormArgs& args) {
  const py::array& weight = args.first;
  if (weight.ndim() != 1) fail("a norm's weight must have 1 dimension, got " + shape_text(weight));
  const int size = checked_int(weight.shape(0), "norm");
  return Norm(read<float>(weight, "norm", {size}), size, args.second);
}

inline PackedLinear* linear_of(const py::object& linear) { return linear.cast<PackedLinear*>(); }

inline LinearPair pair_of(const Linears& linears) {
  if (linears.empty() || linears.size() > 2) fail("expected one or two matrices");
  return LinearPair(linear_of(linears[0]), linears.size() == 2 ? linear_of(linears[1]) : nullptr);
}

inline std::vector<float> floats_of(const std::optional<py::array>& values, const char* name) {
  if (!values) return {};
  const float* data = read<float>(*values, name, {values->size()});
  return std::vector<float>(data, data + values->size());
}

inline int step_rows(const py::array& hidden) {
  if (hidden.ndim() != 2) fail("hidden must have 2 dimensions, got " + shape_text(hidden));
  return checked_int(hidden.shape(0), "tokens");
}

inline std::vector<py::object> together(Linears kept, std::initializer_list<py::object> more) {
  kept.insert(kept.end(), more);
  return kept;
}

// The cache's rows from 0 on, of which [start, start + rows) must be there.
inline void check_context(const py::array& cache, py::ssize_t start, int rows) {
  if (start < 0 || start + rows > cache.shape(0)) {
    fail("tokens " + std::to_string(start) + " to " + std::to_string(start + rows) + " do not fit a cache of " +
         std::to_string(cache.shape(0)));
  }
  if (cache.shape(0) > (1 << 24)) fail("cache has too many rows: " + std::to_string(cache.shape(0)));
}

}  // namespace kt
