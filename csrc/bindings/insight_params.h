// The arguments of `insight` as the kernels see them.
#pragma once

#include "bindings/make_params.h"

namespace fastattn {

// What a look writes, and the edges of distances: tensors as in TensorArguments, the last two or none.
struct InsightArguments {
  TensorArguments forward;  // out may be None
  pybind11::object keys, weights, entropy, key_mass, edges, distance_mass;
};

// Throws std::invalid_argument naming the argument. The parameters point into `derived`.
InsightParams make_insight_params(const InsightArguments& tensors, Derived& derived);

}  // namespace fastattn
