// Turns the tuples that Python hands down into AttentionParams, checking all that memory safety asks for: dtype codes,
// ranks, sizes that agree, strides that are not negative, addresses that are there.
#pragma once

#include <pybind11/pybind11.h>

#include "params.h"

namespace fastattn {

// The tensors of one call as Python gives them: (address, dtype code, sizes, strides), or None.
struct TensorArguments {
  pybind11::object query, key, value, out, lse, weights, mask, bias, kv_lengths, query_offset, alibi_slopes, sinks;
};

// Throws std::invalid_argument (ValueError) naming the argument. Scalars are left to the caller.
AttentionParams make_params(const TensorArguments& tensors);

// The codes of Tensor tuples: DType's, then bool and int64.
enum TensorCode { kCodeBool = 4, kCodeInt64 = 5 };
pybind11::dict dtype_codes();

}  // namespace fastattn
