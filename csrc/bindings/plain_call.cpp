#include "bindings/plain_call.h"

#include <pybind11/numpy.h>

#include <cmath>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/gil.h"
#include "bindings/make_params.h"
#include "dispatch.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// Attributes of a tensor, and what some of them are compared with. Kept for the life of the process.
struct TorchNames {
  PyObject* tensor = nullptr;
  PyObject* strided = nullptr;
  PyObject* dtypes[kDTypes] = {};
  PyObject* empty_like = nullptr;
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* layout = PyUnicode_InternFromString("layout");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* new_empty = PyUnicode_InternFromString("new_empty");
};

TorchNames& torch_names() {
  static TorchNames names;
  return names;
}

py::object get(PyObject* object, PyObject* name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
}

py::object call(PyObject* object, PyObject* method) {
  return py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, method));
}

bool read_sizes(const py::object& from, int64_t (&to)[TensorView::kMaxRank]) {
  if (!from || !PyTuple_Check(from.ptr()) || PyTuple_GET_SIZE(from.ptr()) != TensorView::kMaxRank) {
    return false;
  }
  for (int i = 0; i < TensorView::kMaxRank; ++i) {
    to[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(from.ptr(), i));
  }
  return PyErr_Occurred() == nullptr;
}

bool read_address(PyObject* tensor, TensorView& view) {
  const py::object address = call(tensor, torch_names().data_ptr);
  view.data = address ? PyLong_AsVoidPtr(address.ptr()) : nullptr;
  return view.data != nullptr;
}

// Whether `tensor` is a plain dense tensor of numbers in this machine's memory, without a gradient to be recorded.
bool read_plain_torch(PyObject* tensor, TensorView& view) {
  const TorchNames& names = torch_names();
  if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != names.tensor ||
      get(tensor, names.requires_grad).ptr() != Py_False || get(tensor, names.is_cpu).ptr() != Py_True ||
      get(tensor, names.layout).ptr() != names.strided || call(tensor, names.is_neg).ptr() != Py_False) {
    return false;
  }
  const py::object dtype = get(tensor, names.dtype);
  for (int code = 0; code < kDTypes; ++code) {
    view.code = dtype.ptr() == names.dtypes[code] ? code : view.code;
  }
  view.rank = TensorView::kMaxRank;
  return view.code >= 0 && read_sizes(get(tensor, names.shape), view.sizes) &&
         read_sizes(call(tensor, names.stride), view.strides) && read_address(tensor, view);
}

bool read_torch(py::handle tensor, TensorView& view) {
  const bool plain = read_plain_torch(tensor.ptr(), view);
  if (!plain) {
    PyErr_Clear();  // a tensor without a single block of memory has raised
  }
  return plain;
}

// Whether `array` is a plain array of a type that NumPy itself has, in the machine's byte order.
bool read_numpy(py::handle object, TensorView& view) {
  if (Py_TYPE(object.ptr()) != py::detail::npy_api::get().PyArray_Type_) {
    return false;
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  const int number = dtype.num();
  view.code = number == py::detail::npy_api::NPY_FLOAT_    ? static_cast<int>(DType::float32)
              : number == py::detail::npy_api::NPY_DOUBLE_ ? static_cast<int>(DType::float64)
              : number == 23 /* NPY_HALF */                ? static_cast<int>(DType::float16)
                                                           : -1;
  if (view.code < 0 || dtype.byteorder() != '=' || array.ndim() != TensorView::kMaxRank) {
    return false;
  }
  view.rank = TensorView::kMaxRank;
  view.data = const_cast<void*>(array.data());
  const py::ssize_t itemsize = dtype.itemsize();
  for (int i = 0; i < TensorView::kMaxRank; ++i) {
    if (array.strides(i) % itemsize != 0) {
      return false;
    }
    view.sizes[i] = array.shape(i);
    view.strides[i] = array.strides(i) / itemsize;
  }
  return true;
}

void swap_heads_and_rows(TensorView& view) {
  std::swap(view.sizes[1], view.sizes[2]);
  std::swap(view.strides[1], view.strides[2]);
}

bool is_empty(const TensorView& view) {
  return view.sizes[0] == 0 || view.sizes[1] == 0 || view.sizes[2] == 0 || view.sizes[3] == 0;
}

bool is_contiguous(const TensorView& view) {
  int64_t stride = 1;
  for (int i = TensorView::kMaxRank - 1; i >= 0; --i) {
    if (view.strides[i] != stride) {
      return false;
    }
    stride *= view.sizes[i];
  }
  return true;
}

// The result, contiguous in the order of the query's axes: (B, H, L, Dv) or (B, L, H, Dv). It has no address yet.
// False if its size in bytes may not be counted in 64 bits.
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

py::object empty_numpy(py::handle query, TensorView& out) {
  const auto like = py::reinterpret_borrow<py::array>(query);
  py::array array(like.dtype(), {out.sizes[0], out.sizes[1], out.sizes[2], out.sizes[3]});
  out.data = array.mutable_data();
  return std::move(array);
}

py::object empty_torch(py::handle query, const TensorView& view, TensorView& out) {
  const TorchNames& names = torch_names();
  py::object tensor;
  if (view.sizes[3] == out.sizes[3] && is_contiguous(view)) {
    tensor = py::reinterpret_steal<py::object>(PyObject_CallOneArg(names.empty_like, query.ptr()));
  } else {
    const py::tuple shape = py::make_tuple(out.sizes[0], out.sizes[1], out.sizes[2], out.sizes[3]);
    tensor = py::reinterpret_steal<py::object>(
        PyObject_CallMethodObjArgs(query.ptr(), names.new_empty, shape.ptr(), nullptr));
  }
  if (!tensor || !read_address(tensor.ptr(), out)) {
    throw py::error_already_set();
  }
  return tensor;
}

bool read_scale(py::handle scale, int64_t head_dim, double& value) {
  if (scale.is_none()) {
    value = 1 / std::sqrt(static_cast<double>(head_dim));
    return true;
  }
  value = PyFloat_CheckExact(scale.ptr()) ? PyFloat_AS_DOUBLE(scale.ptr()) : NAN;
  return std::isfinite(value);
}

// Everything but the result; false where something does not fit.
bool read_call(TensorView query, TensorView key, TensorView value, bool causal, py::handle scale, AttentionParams& p) {
  if (is_empty(query) || is_empty(key) || is_empty(value)) {
    return false;
  }
  try {
    check_view("query", query);
    check_view("key", key);
    check_view("value", value);
    set_inputs(query, key, value, p);
  } catch (const std::invalid_argument&) {
    return false;
  }
  p.window_left = kUnbounded;
  p.window_right = causal ? 0 : kUnbounded;
  return read_scale(scale, p.head_dim, p.scale);
}

template <class Read, class Allocate>
py::object attention_plain(py::handle query, py::handle key, py::handle value, bool causal, py::handle scale, bool bshd,
                           int num_threads, Read read, Allocate allocate) {
  TensorView q;
  TensorView k;
  TensorView v;
  if (!read(query, q) || !read(key, k) || !read(value, v)) {
    return py::none();
  }
  const TensorView own = q;
  TensorView out;
  if (!shape_result(q, v.sizes[3], out)) {
    return py::none();
  }
  if (bshd) {
    swap_heads_and_rows(q);
    swap_heads_and_rows(k);
    swap_heads_and_rows(v);
  }
  AttentionParams p{};
  if (!read_call(q, k, v, causal, scale, p)) {
    return py::none();
  }
  const std::vector<int64_t> offsets(static_cast<size_t>(p.batch), p.seqlen_k - p.seqlen_q);
  p.query_offset = offsets.data();
  p.num_threads = num_threads;
  py::object result = allocate(query, own, out);
  if (bshd) {
    swap_heads_and_rows(out);
  }
  check_view("out", out);
  set_out(out, p);
  const ForwardFn run = kernels().forward[static_cast<int>(p.dtype)].run;
  // A thread that ends with the interpreter is unwound from here without its lock: nothing may then let go of an array.
  PyObject* const kept = result.release().ptr();
  try {
    without_gil([&] { run(p); });
  } catch (const std::exception&) {
    Py_DECREF(kept);
    throw;
  }
  return py::reinterpret_steal<py::object>(kept);
}

}  // namespace

void bind_torch(const py::object& tensor, const py::object& strided, const py::tuple& dtypes,
                const py::object& empty_like) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  TorchNames& names = torch_names();
  if (names.tensor != nullptr) {
    return;
  }
  if (dtypes.size() != kDTypes) {
    throw std::invalid_argument("dtypes: expected one for each element type");
  }
  for (int code = 0; code < kDTypes; ++code) {
    names.dtypes[code] = py::object(dtypes[static_cast<size_t>(code)]).release().ptr();
  }
  names.strided = py::object(strided).release().ptr();
  names.empty_like = py::object(empty_like).release().ptr();
  names.tensor = py::object(tensor).release().ptr();
}

py::object attention_plain_numpy(py::handle query, py::handle key, py::handle value, bool causal, py::handle scale,
                                 bool bshd, int num_threads) {
  return attention_plain(
      query, key, value, causal, scale, bshd, num_threads, read_numpy,
      [](py::handle like, const TensorView& /*view*/, TensorView& out) { return empty_numpy(like, out); });
}

py::object attention_plain_torch(py::handle query, py::handle key, py::handle value, bool causal, py::handle scale,
                                 bool bshd, int num_threads) {
  return attention_plain(query, key, value, causal, scale, bshd, num_threads, read_torch, empty_torch);
}

}  // namespace fastattn
