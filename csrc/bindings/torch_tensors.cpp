#include "bindings/torch_tensors.h"

#include <mutex>
#include <stdexcept>

#include "bindings/dlpack_exchange.h"
#include "dispatch.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// Attributes of a tensor, and what some of them are compared with. Kept for the life of the process.
struct TorchNames {
  PyObject* tensor = nullptr;
  PyObject* parameter = nullptr;
  PyObject* strided = nullptr;
  PyObject* dtypes[kDTypes] = {};
  PyObject* empty_like = nullptr;
  ViewOfObject view_of_object = nullptr;
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* layout = PyUnicode_InternFromString("layout");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* new_empty = PyUnicode_InternFromString("new_empty");
  PyObject* dtype_keyword = PyTuple_Pack(1, dtype);
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

bool read_sizes(const py::object& from, int rank, int64_t (&to)[TensorView::kMaxRank]) {
  if (!from || !PyTuple_Check(from.ptr()) || PyTuple_GET_SIZE(from.ptr()) != rank) {
    return false;
  }
  for (int i = 0; i < rank; ++i) {
    to[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(from.ptr(), i));
  }
  return PyErr_Occurred() == nullptr;
}

bool read_address(PyObject* tensor, TensorView& view) {
  const py::object address = call(tensor, torch_names().data_ptr);
  view.data = address ? PyLong_AsVoidPtr(address.ptr()) : nullptr;
  return view.data != nullptr;
}

int code_of(const DLTensor& view) {
  struct Known {
    DLCode kind;
    int bits;
    int code;
  };
  constexpr Known kKnown[] = {{kDLFloat, 32, static_cast<int>(DType::float32)},
                              {kDLBfloat, 16, static_cast<int>(DType::bfloat16)},
                              {kDLFloat, 16, static_cast<int>(DType::float16)},
                              {kDLFloat, 64, static_cast<int>(DType::float64)},
                              {kDLInt, 32, kCodeInt32},
                              {kDLInt, 64, kCodeInt64},
                              {kDLInt, 8, static_cast<int>(DType::int8)},
                              {kDLFloat8E4M3, 8, static_cast<int>(DType::float8_e4m3fn)},
                              {kDLFloat8E5M2, 8, static_cast<int>(DType::float8_e5m2)}};
  for (const Known& known : kKnown) {
    if (view.dtype.code == known.kind && view.dtype.bits == known.bits && view.dtype.lanes == 1) {
      return known.code;
    }
  }
  return -1;
}

bool read_by_table(ViewOfObject view_of_object, PyObject* tensor, int rank, TensorView& view) {
  DLTensor from;
  if (view_of_object(tensor, &from) != 0 || from.device.type != kDLCpu || from.ndim != rank) {
    return false;
  }
  view.code = code_of(from);
  view.data = static_cast<char*>(from.data) + from.byte_offset;
  if (view.code < 0 || from.data == nullptr || from.strides == nullptr) {
    return false;
  }
  for (int i = 0; i < rank; ++i) {
    view.sizes[i] = from.shape[i];
    view.strides[i] = from.strides[i];
  }
  return true;
}

bool read_by_attributes(PyObject* tensor, int rank, TensorView& view) {
  const TorchNames& names = torch_names();
  if (get(tensor, names.is_cpu).ptr() != Py_True || get(tensor, names.layout).ptr() != names.strided) {
    return false;
  }
  const py::object dtype = get(tensor, names.dtype);
  view.code = -1;
  for (int code = 0; code < kDTypes; ++code) {
    view.code = dtype.ptr() == names.dtypes[code] ? code : view.code;
  }
  return view.code >= 0 && read_sizes(get(tensor, names.shape), rank, view.sizes) &&
         read_sizes(call(tensor, names.stride), rank, view.strides) && read_address(tensor, view);
}

bool read(PyObject* tensor, int rank, TensorView& view) {
  const TorchNames& names = torch_names();
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (names.tensor == nullptr || (type != names.tensor && type != names.parameter)) {
    return false;
  }
  view.rank = rank;
  const bool readable = names.view_of_object != nullptr ? read_by_table(names.view_of_object, tensor, rank, view)
                                                        : read_by_attributes(tensor, rank, view);
  // Lazily negated, as the imaginary part of a conjugate: memory has the other sign.
  return readable && call(tensor, names.is_neg).ptr() == Py_False;
}

py::object checked(PyObject* tensor, TensorView& view) {
  py::object owned = py::reinterpret_steal<py::object>(tensor);
  if (!owned || !read_address(tensor, view)) {
    throw py::error_already_set();
  }
  return owned;
}

void set_contiguous(std::initializer_list<int64_t> sizes, TensorView& view) {
  view.rank = static_cast<int>(sizes.size());
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.sizes[i] = sizes.begin()[i];
    view.strides[i] = stride;
    stride *= view.sizes[i];
  }
}

bool is_contiguous(const TensorView& view) {
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    if (view.strides[i] != stride) {
      return false;
    }
    stride *= view.sizes[i];
  }
  return true;
}

}  // namespace

bool read_torch_any(py::handle tensor, int rank, TensorView& view) {
  const bool plain = read(tensor.ptr(), rank, view);
  if (!plain) {
    PyErr_Clear();  // a tensor without a single block of memory has raised
  }
  return plain;
}

bool read_torch(py::handle tensor, int rank, TensorView& view) {
  return read_torch_any(tensor, rank, view) && view.code < kDTypes;
}

py::object empty_torch(py::handle like, std::initializer_list<int64_t> sizes, TensorView& view) {
  set_contiguous(sizes, view);
  // Sizes one by one: torch takes longer over a tuple of them.
  PyObject* arguments[TensorView::kMaxRank + 1] = {like.ptr()};
  py::object held[TensorView::kMaxRank];
  for (int i = 0; i < view.rank; ++i) {
    held[i] = py::reinterpret_steal<py::object>(PyLong_FromLongLong(view.sizes[i]));
    arguments[i + 1] = held[i].ptr();
  }
  return checked(
      PyObject_VectorcallMethod(torch_names().new_empty, arguments, static_cast<size_t>(view.rank) + 1, nullptr), view);
}

py::object empty_torch(py::handle like, DType dtype, std::initializer_list<int64_t> sizes, TensorView& view) {
  set_contiguous(sizes, view);
  view.code = static_cast<int>(dtype);
  const TorchNames& names = torch_names();
  py::tuple shape(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    shape[i] = sizes.begin()[i];
  }
  PyObject* const arguments[] = {like.ptr(), shape.ptr(), names.dtypes[static_cast<int>(dtype)]};
  return checked(PyObject_VectorcallMethod(names.new_empty, arguments, 2, names.dtype_keyword), view);
}

py::object empty_torch_like(py::handle like, const TensorView& view, TensorView& out) {
  if (!is_contiguous(view)) {
    return empty_torch(like, {view.sizes[0], view.sizes[1], view.sizes[2], view.sizes[3]}, out);
  }
  out = view;
  return checked(PyObject_CallOneArg(torch_names().empty_like, like.ptr()), out);
}

void bind_torch(const py::object& tensor, const py::object& parameter, const py::object& strided,
                const py::tuple& dtypes, const py::object& empty_like, const py::object& exchange) {
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
  if (PyCapsule_IsValid(exchange.ptr(), "dlpack_exchange_api") != 0) {
    const auto* table = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    names.view_of_object = table->version.major == kDLPackMajor ? table->view_of_object : nullptr;
  }
  names.strided = py::object(strided).release().ptr();
  names.empty_like = py::object(empty_like).release().ptr();
  names.parameter = py::object(parameter).release().ptr();
  names.tensor = py::object(tensor).release().ptr();
}

}  // namespace fastattn
