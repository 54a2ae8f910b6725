// Calls with query, key and value alone, straight from the arrays to the kernels: on few tokens a call takes
// microseconds, and the way through Python's checks several of them.
//
// Each returns a new array, or None for a call that needs a closer look, whatever it is: the long way then answers, or
// says what is wrong. Nothing is decided here that is not decided there.
#pragma once

#include <pybind11/pybind11.h>

namespace fastattn {

// Names what the torch lane needs: torch.Tensor, torch.strided, its dtypes in the order of DType, torch.empty_like.
void bind_torch(const pybind11::object& tensor, const pybind11::object& strided, const pybind11::tuple& dtypes,
                const pybind11::object& empty_like);

// `scale` is a float or None; `bshd`: axes 1 and 2 are exchanged. The caller knows that no mode of torch, no transform
// and no trace is in force.
pybind11::object attention_plain_numpy(pybind11::handle query, pybind11::handle key, pybind11::handle value,
                                       bool causal, pybind11::handle scale, bool bshd, int num_threads);
pybind11::object attention_plain_torch(pybind11::handle query, pybind11::handle key, pybind11::handle value,
                                       bool causal, pybind11::handle scale, bool bshd, int num_threads);

}  // namespace fastattn
