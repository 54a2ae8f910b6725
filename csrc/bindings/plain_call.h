// Calls with query, key, value and no more than lengths of these, straight from the arrays to the kernels: on few
// tokens a call takes microseconds, and the way through Python's checks several of them.
//
// Each returns new arrays, or None for a call that needs a closer look, whatever it is: the long way then answers, or
// says what is wrong. Nothing is decided here that is not decided there.
#pragma once

#include <pybind11/pybind11.h>

namespace fastattn {

// `kv_lengths` holds integers or is None, `scale` is a float or None; `bshd`: axes 1 and 2 are exchanged.
pybind11::object attention_plain_numpy(pybind11::handle query, pybind11::handle key, pybind11::handle value,
                                       pybind11::handle kv_lengths, bool causal, pybind11::handle scale, bool bshd,
                                       int num_threads);

// The caller knows that no mode of torch, no transform and no trace is in force, and records the gradient himself if
// there is to be one. Returns out, or (out, lse).
pybind11::object attention_plain_torch(pybind11::handle query, pybind11::handle key, pybind11::handle value,
                                       pybind11::handle kv_lengths, bool causal, pybind11::handle scale, bool bshd,
                                       bool return_lse, int num_threads);

// What a plain call without lengths returned, the gradients of that (grad_lse may be None), and which gradients to
// compute.
struct PlainGradients {
  pybind11::handle out, lse, grad_out, grad_lse;
  bool of_query, of_key, of_value;
};

// Returns the gradients of query, key and value, None in the place of those that were not asked for.
pybind11::object attention_plain_backward(const PlainGradients& gradients, pybind11::handle query, pybind11::handle key,
                                          pybind11::handle value, bool causal, pybind11::handle scale, bool bshd,
                                          int num_threads);

}  // namespace fastattn
