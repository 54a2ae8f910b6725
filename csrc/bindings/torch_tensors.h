// Tensors of torch, read and made through Python, or through DLPack's table where torch has it: no libtorch.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>

#include "bindings/make_params.h"

namespace fastattn {

// Names what is needed: the classes torch.Tensor and torch.nn.Parameter, torch.strided, the dtypes in the order of
// DType, torch.empty_like, and Tensor.__dlpack_c_exchange_api__ or None.
void bind_torch(const pybind11::object& tensor, const pybind11::object& parameter, const pybind11::object& strided,
                const pybind11::tuple& dtypes, const pybind11::object& empty_like, const pybind11::object& exchange);

// Whether `tensor` is a plain dense tensor of floating-point numbers in this machine's memory, with `rank` axes.
// Whether it requires grad is not asked. Never leaves an error behind.
bool read_torch(pybind11::handle tensor, int rank, TensorView& view);
// The same of any type that has a code.
bool read_torch_any(pybind11::handle tensor, int rank, TensorView& view);

// A new contiguous tensor of these sizes, of `like`'s dtype or of `code`'s; `view` is of the new tensor. Throws what
// torch raises.
pybind11::object empty_torch(pybind11::handle like, std::initializer_list<int64_t> sizes, TensorView& view);
pybind11::object empty_torch(pybind11::handle like, DType dtype, std::initializer_list<int64_t> sizes,
                             TensorView& view);
// One with the sizes of `like` where `view`, of `like`, is contiguous: the quickest way.
pybind11::object empty_torch_like(pybind11::handle like, const TensorView& view, TensorView& out);

}  // namespace fastattn
