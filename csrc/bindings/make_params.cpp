#include "bindings/make_params.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace fastattn {

[[noreturn]] void fail(const char* name, const std::string& what) {
  throw std::invalid_argument(std::string(name) + ": " + what);
}

namespace {

void read_numbers(const char* name, const py::handle& from, int64_t* to, int rank) {
  const auto numbers = py::reinterpret_borrow<py::tuple>(from);
  if (!PyTuple_Check(from.ptr()) || static_cast<int>(numbers.size()) != rank) {
    fail(name, "expected " + std::to_string(rank) + " sizes and strides");
  }
  for (int i = 0; i < rank; ++i) {
    to[i] = numbers[i].cast<int64_t>();
  }
}

}  // namespace

TensorView read_tuple(const char* name, const py::object& from, int rank) {
  TensorView view;
  if (!PyTuple_Check(from.ptr()) || PyTuple_GET_SIZE(from.ptr()) != 4) {
    fail(name, "expected a tuple (address, dtype code, sizes, strides)");
  }
  const auto parts = py::reinterpret_borrow<py::tuple>(from);
  view.data = reinterpret_cast<void*>(parts[0].cast<uintptr_t>());
  view.code = parts[1].cast<int>();
  view.rank = rank;
  read_numbers(name, parts[2], view.sizes, rank);
  read_numbers(name, parts[3], view.strides, rank);
  check_view(name, view);
  return view;
}

void expect_sizes(const char* name, const TensorView& view, std::initializer_list<int64_t> sizes) {
  int axis = 0;
  for (const int64_t size : sizes) {
    if (view.sizes[axis] != size) {
      fail(name, "axis " + std::to_string(axis) + " has size " + std::to_string(view.sizes[axis]) + ", expected " +
                     std::to_string(size));
    }
    ++axis;
  }
}

void expect_code(const char* name, const TensorView& view, int code) {
  if (view.code != code) {
    fail(name, "dtype code " + std::to_string(view.code) + ", expected " + std::to_string(code));
  }
}

namespace {

void read_outputs(const TensorArguments& tensors, AttentionParams& p) {
  if (!tensors.out.is_none()) {
    set_out(read_tuple("out", tensors.out, 4), p);
  }
  if (!tensors.lse.is_none()) {
    const TensorView lse = read_tuple("lse", tensors.lse, 3);
    expect_code("lse", lse, static_cast<int>(lse_dtype(p.dtype)));
    expect_sizes("lse", lse, {p.batch, p.query_heads, p.seqlen_q});
    p.lse = lse.data;
    copy_strides(lse, p.lse_strides);
  }
  if (!tensors.weights.is_none()) {
    const TensorView weights = read_tuple("weights", tensors.weights, 4);
    expect_code("weights", weights, static_cast<int>(p.dtype));
    expect_sizes("weights", weights, {p.batch, p.query_heads, p.seqlen_q, p.seqlen_k});
    p.weights = weights.data;
    copy_strides(weights, p.weights_strides);
  }
}

void read_dense(const TensorArguments& tensors, AttentionParams& p) {
  if (!tensors.mask.is_none()) {
    const TensorView mask = read_tuple("mask", tensors.mask, 4);
    expect_code("mask", mask, kCodeBool);
    expect_sizes("mask", mask, {p.batch, p.query_heads, p.seqlen_q, p.seqlen_k});
    p.mask = static_cast<const uint8_t*>(mask.data);
    copy_strides(mask, p.mask_strides);
  }
  if (!tensors.bias.is_none()) {
    const TensorView bias = read_tuple("bias", tensors.bias, 4);
    if (bias.code != static_cast<int>(p.dtype) && bias.code != static_cast<int>(DType::float32)) {
      fail("bias", "dtype code " + std::to_string(bias.code) + ", expected the query's or float32");
    }
    expect_sizes("bias", bias, {p.batch, p.query_heads, p.seqlen_q, p.seqlen_k});
    p.bias = bias.data;
    p.bias_dtype = static_cast<DType>(bias.code);
    copy_strides(bias, p.bias_strides);
  }
}

// Small tables that every tier reads as plain arrays.
template <class T>
const T* read_table(const char* name, const py::object& from, int code, int64_t size) {
  return static_cast<const T*>(numbers_of(name, read_tuple(name, from, 1), code, size));
}

const int64_t* read_batch_table(const char* name, const py::object& from, int64_t batch) {
  return from.is_none() ? nullptr : read_table<int64_t>(name, from, kCodeInt64, batch);
}

// Copies the rows at which sequences start.
Starts read_starts(const char* name, const py::object& from, int64_t rows) {
  const TensorView view = read_tuple(name, from, 1);
  expect_code(name, view, kCodeInt64);
  if (view.sizes[0] < 1) {
    fail(name, "expected a start at least");
  }
  Starts starts(static_cast<size_t>(view.sizes[0]));
  int64_t last = 0;
  for (int64_t i = 0; i < view.sizes[0]; ++i) {
    const int64_t start = static_cast<const int64_t*>(view.data)[i * view.strides[0]];
    if (start < last || start > rows) {
      fail(name, "must rise within 0.." + std::to_string(rows));
    }
    starts[static_cast<size_t>(i)] = last = start;
  }
  return starts;
}

void read_sequences(const TensorArguments& tensors, const AttentionParams& p, Derived& derived) {
  if (tensors.cu_seqlens_q.is_none()) {
    return;
  }
  derived.query_starts = read_starts("cu_seqlens_q", tensors.cu_seqlens_q, p.seqlen_q);
  derived.key_starts = read_starts("cu_seqlens_k", tensors.cu_seqlens_k, p.seqlen_k);
  const bool plain = p.batch == 1 && p.weights == nullptr && p.mask == nullptr && p.bias == nullptr;
  if (!plain || derived.query_starts.size() != derived.key_starts.size() || p.block_table != nullptr) {
    fail("cu_seqlens_q, cu_seqlens_k", "expected as many of both, a batch of 1, and neither mask, bias nor weights");
  }
}

void read_rules(const TensorArguments& tensors, const Derived& derived, AttentionParams& p) {
  const int64_t sequences = derived.sequences(p.batch);
  p.query_offset = read_table<int64_t>("query_offset", tensors.query_offset, kCodeInt64, sequences);
  p.kv_lengths = read_batch_table("kv_lengths", tensors.kv_lengths, p.batch);
  p.kv_starts = read_batch_table("kv_starts", tensors.kv_starts, p.batch);
  p.query_lengths = read_batch_table("query_lengths", tensors.query_lengths, p.batch);
  if (tensors.query_segments.is_none() != tensors.key_segments.is_none()) {
    fail("query_segments, key_segments", "expected both or neither");
  }
  const auto segments = [&](const char* name, const py::object& from, int64_t rows, const int64_t*& to,
                            int64_t& stride) {
    if (from.is_none()) {
      return;
    }
    const TensorView view = read_tuple(name, from, 2);
    expect_code(name, view, kCodeInt64);
    expect_sizes(name, view, {p.batch, rows});
    if (rows > 1 && view.strides[1] != 1) {
      fail(name, "the segments of a sequence must be contiguous");
    }
    to = static_cast<const int64_t*>(view.data);
    stride = view.strides[0];
  };
  segments("query_segments", tensors.query_segments, p.seqlen_q, p.query_segments, p.segment_strides[0]);
  segments("key_segments", tensors.key_segments, p.seqlen_k, p.key_segments, p.segment_strides[1]);
  constexpr int kFloat64 = static_cast<int>(DType::float64);
  if (!tensors.sinks.is_none()) {
    p.sinks = read_table<double>("sinks", tensors.sinks, kFloat64, p.query_heads);
  }
  if (!tensors.alibi_slopes.is_none()) {
    const TensorView slopes = read_tuple("alibi_slopes", tensors.alibi_slopes, 2);
    expect_code("alibi_slopes", slopes, kFloat64);
    expect_sizes("alibi_slopes", slopes, {sequences, p.query_heads});
    p.alibi_slopes = static_cast<const double*>(slopes.data);
    copy_strides(slopes, p.alibi_strides);
  }
}

void read_scales(const char* name, const py::object& from, const TensorView& of, const float*& to,
                 int64_t (&strides)[3]) {
  if (!from.is_none()) {
    set_scales(name, read_tuple(name, from, 3), of, to, strides);
  }
}

int64_t used_pages(const AttentionParams& p, int64_t batch) {
  return (p.kv_lengths[batch] + p.page_size - 1) / p.page_size;
}

}  // namespace

void check_view(const char* name, const TensorView& view) {
  bool empty = false;
  for (int i = 0; i < view.rank; ++i) {
    if (view.sizes[i] < 0 || view.strides[i] < 0) {
      fail(name, "sizes and strides must not be negative");
    }
    empty |= view.sizes[i] == 0;
  }
  // Elements are counted even where a stride of 0 repeats them: kernels compute with such products.
  int64_t count = 1;
  for (int i = 0; i < view.rank && !empty; ++i) {
    if (__builtin_mul_overflow(count, view.sizes[i], &count) || count > kMaxElements) {
      fail(name, "has more elements than 64-bit sizes in bytes can count");
    }
  }
  int64_t span = 0;
  for (int i = 0; i < view.rank && !empty; ++i) {
    int64_t reach = 0;
    if (__builtin_mul_overflow(view.sizes[i] - 1, view.strides[i], &reach) ||
        __builtin_add_overflow(span, reach, &span) || span > kMaxElements) {
      fail(name, "its last element lies beyond the 64-bit address space");
    }
  }
  if (!empty && view.data == nullptr) {
    fail(name, "has elements but no address");
  }
}

const void* numbers_of(const char* name, const TensorView& view, int code, int64_t size) {
  expect_code(name, view, code);
  expect_sizes(name, view, {size});
  if (size > 1 && view.strides[0] != 1) {
    fail(name, "must be contiguous");
  }
  return view.data;
}

void set_inputs(const TensorView& query, const TensorView& key, const TensorView& value, AttentionParams& p) {
  if (query.code < 0 || query.code > static_cast<int>(DType::float16)) {
    fail("query", "dtype code " + std::to_string(query.code) + " is not one of float32, float64, bfloat16, float16");
  }
  const bool quantised = key.code >= static_cast<int>(DType::int8) && key.code <= static_cast<int>(DType::float8_e5m2);
  if (!quantised) {
    expect_code("key", key, query.code);
  }
  expect_code("value", value, key.code);
  p.dtype = static_cast<DType>(query.code);
  p.kv_dtype = static_cast<DType>(key.code);
  p.batch = query.sizes[0];
  p.query_heads = query.sizes[1];
  p.seqlen_q = query.sizes[2];
  p.head_dim = query.sizes[3];
  p.kv_heads = key.sizes[1];
  p.seqlen_k = key.sizes[2];
  p.value_dim = value.sizes[3];
  expect_sizes("key", key, {p.batch, p.kv_heads, p.seqlen_k, p.head_dim});
  expect_sizes("value", value, {p.batch, p.kv_heads, p.seqlen_k, p.value_dim});
  if (p.kv_heads < 1 || p.query_heads % p.kv_heads != 0) {
    fail("key", "its heads must divide the query's");
  }
  if (p.head_dim < 1 || p.head_dim > kMaxHeadDim || p.value_dim < 1 || p.value_dim > kMaxValueDim) {
    fail("query, value", "head_dim must be within 1.." + std::to_string(kMaxHeadDim) + ", value_dim within 1.." +
                             std::to_string(kMaxValueDim));
  }
  p.query = query.data;
  p.key = key.data;
  p.value = value.data;
  copy_strides(query, p.query_strides);
  copy_strides(key, p.key_strides);
  copy_strides(value, p.value_strides);
}

void set_out(const TensorView& out, AttentionParams& p) {
  expect_code("out", out, static_cast<int>(p.dtype));
  expect_sizes("out", out, {p.batch, p.query_heads, p.seqlen_q, p.value_dim});
  p.out = out.data;
  copy_strides(out, p.out_strides);
}

bool holds_integers(const TensorView& view) { return view.code == kCodeInt32 || view.code == kCodeInt64; }

int64_t integer_at(const TensorView& view, int64_t index) {
  return view.code == kCodeInt32 ? static_cast<const int32_t*>(view.data)[index]
                                 : static_cast<const int64_t*>(view.data)[index];
}

void expect_table(const TensorView& table, int64_t batch) {
  if (!holds_integers(table)) {
    fail("block_table", "dtype code " + std::to_string(table.code) + ", expected int32 or int64");
  }
  expect_sizes("block_table", table, {batch, table.sizes[1]});
}

int64_t page_at(const TensorView& table, int64_t sequence, int64_t slot, int64_t num_pages) {
  const int64_t page = integer_at(table, sequence * table.strides[0] + slot * table.strides[1]);
  if (page < 0 || page >= num_pages) {
    fail("block_table", "sequence " + std::to_string(sequence) + ", slot " + std::to_string(slot) + " names page " +
                            std::to_string(page) + ", expected 0.." + std::to_string(num_pages - 1));
  }
  return page;
}

void set_paged_inputs(const TensorView& query, TensorView key, TensorView value, const TensorView& table,
                      const int64_t* kv_lengths, AttentionParams& p, Pages& pages) {
  expect_table(table, query.sizes[0]);
  expect_sizes("value", value, {key.sizes[0], key.sizes[1], key.sizes[2], value.sizes[3]});
  p.page_size = key.sizes[2];
  int64_t keys = 0;
  if (p.page_size < 1 || __builtin_mul_overflow(p.page_size, table.sizes[1], &keys) || keys > kMaxElements) {
    fail("block_table", "pages must hold at least a key, and no more than 64-bit sizes in bytes can count");
  }
  const int64_t num_pages = key.sizes[0];
  for (TensorView* view : {&key, &value}) {
    view->sizes[0] = query.sizes[0];
    view->sizes[2] = keys;
  }
  set_inputs(query, key, value, p);
  p.kv_lengths = kv_lengths;
  if (p.kv_lengths == nullptr) {
    fail("kv_lengths", "pages need lengths");
  }
  p.block_table_stride = 1;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.kv_lengths[b] < 0 || p.kv_lengths[b] > keys) {
      fail("kv_lengths", "must be within what the pages of a sequence hold");
    }
    p.block_table_stride = std::max(p.block_table_stride, used_pages(p, b));
  }
  pages.assign(static_cast<size_t>(p.batch * p.block_table_stride), 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    // What stands beyond the length is nobody's.
    for (int64_t slot = 0; slot < used_pages(p, b); ++slot) {
      pages[static_cast<size_t>(b * p.block_table_stride + slot)] = page_at(table, b, slot, num_pages);
    }
  }
  p.block_table = pages.data();
}

void set_scales(const char* name, const TensorView& view, const TensorView& of, const float*& to,
                int64_t (&strides)[3]) {
  expect_code(name, view, static_cast<int>(DType::float32));
  expect_sizes(name, view, {of.sizes[0], of.sizes[1], of.sizes[2]});
  to = static_cast<const float*>(view.data);
  copy_strides(view, strides);
}

AttentionParams make_params(const TensorArguments& tensors, Derived& derived) {
  AttentionParams p{};
  const TensorView query = read_tuple("query", tensors.query, 4);
  const TensorView key = read_tuple("key", tensors.key, 4);
  const TensorView value = read_tuple("value", tensors.value, 4);
  if (tensors.block_table.is_none()) {
    set_inputs(query, key, value, p);
  } else {
    set_paged_inputs(query, key, value, read_tuple("block_table", tensors.block_table, 2),
                     read_batch_table("kv_lengths", tensors.kv_lengths, query.sizes[0]), p, derived.pages);
  }
  read_scales("key_scales", tensors.key_scales, key, p.key_scales, p.key_scale_strides);
  read_scales("value_scales", tensors.value_scales, value, p.value_scales, p.value_scale_strides);
  if ((p.kv_dtype != p.dtype) != (p.key_scales != nullptr) || (p.kv_dtype != p.dtype) != (p.value_scales != nullptr)) {
    fail("key_scales, value_scales", "expected both with quantised keys and values, and neither with others");
  }
  if (p.kv_dtype != p.dtype && (!tensors.bias.is_none() || !tensors.weights.is_none())) {
    fail("bias, weights", "there are none with quantised keys");
  }
  read_outputs(tensors, p);
  read_dense(tensors, p);
  read_sequences(tensors, p, derived);
  read_rules(tensors, derived, p);
  find_segments(p, derived.segments);
  return p;
}

BackwardParams make_backward_params(const GradientArguments& tensors, Derived& derived) {
  BackwardParams b{};
  b.forward = make_params(tensors.forward, derived);
  if (b.forward.block_table != nullptr || b.forward.key_scales != nullptr) {
    fail("key", "there is no backward through a cache");
  }
  const AttentionParams& p = b.forward;
  if (p.lse == nullptr) {
    fail("lse", "the backward needs it");
  }
  if (p.query_heads < 1) {
    fail("query", "the backward needs a head");
  }
  const int own = static_cast<int>(p.dtype);
  const int wide = static_cast<int>(lse_dtype(p.dtype));
  const auto read = [](const char* name, const py::object& from, int code, std::initializer_list<int64_t> sizes,
                       auto& pointer, auto& strides) {
    if (from.is_none()) {
      return;
    }
    const TensorView view = read_tuple(name, from, static_cast<int>(sizes.size()));
    expect_code(name, view, code);
    expect_sizes(name, view, sizes);
    pointer = view.data;
    copy_strides(view, strides);
  };
  const int64_t rows = p.seqlen_q;
  read("grad_out", tensors.grad_out, own, {p.batch, p.query_heads, rows, p.value_dim}, b.grad_out, b.grad_out_strides);
  if (b.grad_out == nullptr) {
    fail("grad_out", "the backward needs it");
  }
  read("grad_lse", tensors.grad_lse, wide, {p.batch, p.query_heads, rows}, b.grad_lse, b.grad_lse_strides);
  read("grad_weights", tensors.grad_weights, own, {p.batch, p.query_heads, rows, p.seqlen_k}, b.grad_weights,
       b.grad_weights_strides);
  read("grad_query", tensors.grad_query, own, {p.batch, p.query_heads, rows, p.head_dim}, b.grad_query,
       b.grad_query_strides);
  read("grad_key", tensors.grad_key, own, {p.batch, p.kv_heads, p.seqlen_k, p.head_dim}, b.grad_key,
       b.grad_key_strides);
  read("grad_value", tensors.grad_value, own, {p.batch, p.kv_heads, p.seqlen_k, p.value_dim}, b.grad_value,
       b.grad_value_strides);
  read("grad_bias", tensors.grad_bias, wide, {p.batch, p.query_heads, rows, p.seqlen_k}, b.grad_bias,
       b.grad_bias_strides);
  const int64_t sequences = derived.sequences(p.batch);
  const auto table = [&](const char* name, const py::object& from) -> double* {
    if (from.is_none()) {
      return nullptr;
    }
    const TensorView view = read_tuple(name, from, 2);
    expect_code(name, view, static_cast<int>(DType::float64));
    expect_sizes(name, view, {sequences, p.query_heads});
    if (view.strides[1] != 1 || view.strides[0] != p.query_heads) {
      fail(name, "must be contiguous");
    }
    return static_cast<double*>(view.data);
  };
  b.grad_slopes = table("grad_slopes", tensors.grad_slopes);
  b.grad_sinks = table("grad_sinks", tensors.grad_sinks);
  if ((b.grad_bias != nullptr && p.bias == nullptr) || (b.grad_slopes != nullptr && p.alibi_slopes == nullptr) ||
      (b.grad_sinks != nullptr && p.sinks == nullptr)) {
    fail("grad_bias, grad_slopes, grad_sinks", "there is nothing that they would be a gradient of");
  }
  return b;
}

py::dict dtype_codes() {
  py::dict codes;
  codes["float32"] = static_cast<int>(DType::float32);
  codes["float64"] = static_cast<int>(DType::float64);
  codes["bfloat16"] = static_cast<int>(DType::bfloat16);
  codes["float16"] = static_cast<int>(DType::float16);
  codes["bool"] = static_cast<int>(kCodeBool);
  codes["int64"] = static_cast<int>(kCodeInt64);
  codes["int8"] = static_cast<int>(DType::int8);
  codes["float8_e4m3fn"] = static_cast<int>(DType::float8_e4m3fn);
  codes["float8_e5m2"] = static_cast<int>(DType::float8_e5m2);
  codes["int32"] = static_cast<int>(kCodeInt32);
  return codes;
}

}  // namespace fastattn
