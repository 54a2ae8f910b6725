// Arrays as the short ways of calls read and make them: what is not known at sight is left to the long way.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/make_params.h"

namespace fastattn {

bool is_numpy(pybind11::handle array);
// Whether `array` is a plain array with `rank` axes, of a type that NumPy itself has, in the machine's byte order.
bool read_numpy(pybind11::handle array, int rank, TensorView& view);
pybind11::object empty_numpy(pybind11::handle query, TensorView& out);

// Exchanges axes 1 and 2.
void swap_heads_and_rows(TensorView& view);
bool is_empty(const TensorView& view);

// The result, contiguous in the order of the query's axes: (B, H, L, Dv) or (B, L, H, Dv). It has no address yet.
// False if its size in bytes may not be counted in 64 bits.
bool shape_result(const TensorView& query, int64_t value_dim, TensorView& out);

// Whether `scale` is None, which stands for 1 / sqrt(D), or a finite float.
bool read_scale(pybind11::handle scale, int64_t head_dim, double& value);

DType lse_dtype(DType dtype);
pybind11::object empty_lse(pybind11::handle query, const AttentionParams& p, TensorView& lse);

}  // namespace fastattn
