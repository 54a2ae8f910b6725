// Arrays as the short ways of calls read and make them: what is not known at sight is left to the long way.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "bindings/make_params.h"

namespace fastattn {

bool is_numpy(pybind11::handle array);
// Whether `array` is a plain array with `rank` axes, of a type that NumPy itself has, in the machine's byte order.
bool read_numpy(pybind11::handle array, int rank, TensorView& view);

// read_numpy, or one of torch's.
using ReadFn = bool (*)(pybind11::handle, int, TensorView&);

// Whether `from` is a vector of `batch` integers from 0 to `limit`, which are added to `lengths`.
bool read_lengths(pybind11::handle from, ReadFn read, int64_t batch, int64_t limit, std::vector<int64_t>& lengths);

// Exchanges axes 1 and 2.
void swap_heads_and_rows(TensorView& view);
bool is_empty(const TensorView& view);

// The result, contiguous in the order of the query's axes: (B, H, L, Dv) or (B, L, H, Dv). It has no address yet.
// False if its size in bytes may not be counted in 64 bits.
bool shape_result(const TensorView& query, int64_t value_dim, TensorView& out);

// Whether `scale` is None, which stands for 1 / sqrt(D), or a finite float.
bool read_scale(pybind11::handle scale, int64_t head_dim, double& value);

// Memory of the query's library for a result that has been shaped; `own`: the query with its own axes.
pybind11::object empty_result(pybind11::handle query, const TensorView& own, TensorView& out);
pybind11::object empty_lse(pybind11::handle query, const AttentionParams& p, TensorView& lse);
// Where the kernel writes both. `bshd`: the order of the result's axes.
void set_result(TensorView out, bool bshd, AttentionParams& p);
void set_lse(const TensorView& lse, AttentionParams& p);

}  // namespace fastattn
