#include "bindings/plain_arrays.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "bindings/torch_tensors.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// Codes of the types that NumPy itself has, by its numbers for them.
int code_of(int number) {
  switch (number) {
    case py::detail::npy_api::NPY_FLOAT_:
      return static_cast<int>(DType::float32);
    case py::detail::npy_api::NPY_DOUBLE_:
      return static_cast<int>(DType::float64);
    case 23:  // NPY_HALF
      return static_cast<int>(DType::float16);
    case py::detail::npy_api::NPY_BYTE_:
      return static_cast<int>(DType::int8);
    case py::detail::npy_api::NPY_INT_:
      return kCodeInt32;
    case py::detail::npy_api::NPY_LONG_:
    case py::detail::npy_api::NPY_LONGLONG_:
      return number == py::detail::npy_api::NPY_LONGLONG_ || sizeof(long) == 8 ? kCodeInt64 : kCodeInt32;
    default:
      return -1;
  }
}

}  // namespace

bool is_numpy(py::handle object) { return Py_TYPE(object.ptr()) == py::detail::npy_api::get().PyArray_Type_; }

bool read_numpy(py::handle object, int rank, TensorView& view) {
  if (!is_numpy(object)) {
    return false;
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  view.code = code_of(dtype.num());
  // 8-bit numbers have no byte order
  if (view.code < 0 || (dtype.byteorder() != '=' && dtype.byteorder() != '|') || array.ndim() != rank) {
    return false;
  }
  view.rank = rank;
  view.data = const_cast<void*>(array.data());
  const py::ssize_t itemsize = dtype.itemsize();
  for (int i = 0; i < rank; ++i) {
    if (array.strides(i) % itemsize != 0) {
      return false;
    }
    view.sizes[i] = array.shape(i);
    view.strides[i] = array.strides(i) / itemsize;
  }
  return true;
}

bool read_lengths(py::handle from, ReadFn read, int64_t batch, int64_t limit, std::vector<int64_t>& lengths) {
  TensorView view;
  if (!read(from, 1, view) || !holds_integers(view) || view.sizes[0] != batch) {
    return false;
  }
  for (int64_t b = 0; b < batch; ++b) {
    lengths.push_back(integer_at(view, b * view.strides[0]));
  }
  return std::all_of(lengths.begin(), lengths.end(), [limit](int64_t n) { return n >= 0 && n <= limit; });
}

void swap_heads_and_rows(TensorView& view) {
  std::swap(view.sizes[1], view.sizes[2]);
  std::swap(view.strides[1], view.strides[2]);
}

bool is_empty(const TensorView& view) {
  return view.sizes[0] == 0 || view.sizes[1] == 0 || view.sizes[2] == 0 || view.sizes[3] == 0;
}

bool shape_result(const TensorView& query, int64_t value_dim, TensorView& out) {
  out = query;
  out.sizes[3] = value_dim;
  int64_t stride = 1;
  for (int i = TensorView::kMaxRank - 1; i >= 0; --i) {
    out.strides[i] = stride;
    if (__builtin_mul_overflow(stride, out.sizes[i], &stride) || stride > kMaxElements) {
      return false;
    }
  }
  return true;
}

py::object empty_result(py::handle query, const TensorView& own, TensorView& out) {
  if (!is_numpy(query)) {
    return own.sizes[3] == out.sizes[3]
               ? empty_torch_like(query, own, out)
               : empty_torch(query, {out.sizes[0], out.sizes[1], out.sizes[2], out.sizes[3]}, out);
  }
  const auto like = py::reinterpret_borrow<py::array>(query);
  py::array array(like.dtype(), {out.sizes[0], out.sizes[1], out.sizes[2], out.sizes[3]});
  out.data = array.mutable_data();
  return std::move(array);
}

bool read_scale(py::handle scale, int64_t head_dim, double& value) {
  if (scale.is_none()) {
    value = 1 / std::sqrt(static_cast<double>(head_dim));
    return true;
  }
  value = PyFloat_CheckExact(scale.ptr()) ? PyFloat_AS_DOUBLE(scale.ptr()) : NAN;
  return std::isfinite(value);
}

py::object empty_lse(py::handle query, const AttentionParams& p, TensorView& lse) {
  const std::initializer_list<int64_t> sizes = {p.batch, p.query_heads, p.seqlen_q};
  const DType dtype = lse_dtype(p.dtype);
  return dtype == p.dtype ? empty_torch(query, sizes, lse) : empty_torch(query, dtype, sizes, lse);
}

void set_result(TensorView out, bool bshd, AttentionParams& p) {
  if (bshd) {
    swap_heads_and_rows(out);
  }
  check_view("out", out);
  set_out(out, p);
}

void set_lse(const TensorView& lse, AttentionParams& p) {
  p.lse = lse.data;
  std::copy_n(lse.strides, 3, p.lse_strides);
}

}  // namespace fastattn
