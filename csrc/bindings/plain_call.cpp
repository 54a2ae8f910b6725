#include "bindings/plain_call.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/gil.h"
#include "bindings/make_params.h"
#include "bindings/plain_arrays.h"
#include "bindings/torch_tensors.h"
#include "dispatch.h"

namespace py = pybind11;

namespace fastattn {
namespace {

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

// A plain call, read: views with the axes (B, H, L, D) whatever the layout.
struct PlainCall {
  TensorView query, key, value;
  TensorView own;  // query, with its axes as they came
  AttentionParams params{};
  std::vector<int64_t> offsets, kv_lengths;
};

// Whether query, key and value make a call. The parameters point to the offsets, so `c` may not move afterwards.
bool read_plain(py::handle query, py::handle key, py::handle value, bool causal, py::handle scale, bool bshd,
                int num_threads, ReadFn read, PlainCall& c) {
  if (!read(query, TensorView::kMaxRank, c.query) || !read(key, TensorView::kMaxRank, c.key) ||
      !read(value, TensorView::kMaxRank, c.value)) {
    return false;
  }
  c.own = c.query;
  if (bshd) {
    swap_heads_and_rows(c.query);
    swap_heads_and_rows(c.key);
    swap_heads_and_rows(c.value);
  }
  if (!read_call(c.query, c.key, c.value, causal, scale, c.params)) {
    return false;
  }
  c.offsets.assign(static_cast<size_t>(c.params.batch), c.params.seqlen_k - c.params.seqlen_q);
  c.params.query_offset = c.offsets.data();
  c.params.num_threads = num_threads;
  return true;
}

// Whether `from` is None or lengths of the keys; `c` may not move afterwards.
bool read_kv_lengths(py::handle from, ReadFn read, PlainCall& c) {
  if (from.is_none()) {
    return true;
  }
  if (!read_lengths(from, read, c.params.batch, c.params.seqlen_k, c.kv_lengths)) {
    return false;
  }
  c.params.kv_lengths = c.kv_lengths.data();
  return true;
}

bool read_array(py::handle array, int rank, TensorView& view) {
  return read_numpy(array, rank, view) && view.code < kDTypes;
}

// Memory for one gradient, with the sizes of `like`; the kernel's view of it has the axes (B, H, L, D).
py::object empty_gradient(py::handle like, TensorView view, bool bshd, void*& data, int64_t (&strides)[4]) {
  if (bshd) {
    swap_heads_and_rows(view);
  }
  TensorView gradient;
  py::object tensor = empty_torch_like(like, view, gradient);
  if (bshd) {
    swap_heads_and_rows(gradient);
  }
  data = gradient.data;
  std::copy_n(gradient.strides, 4, strides);
  return tensor;
}

bool has_sizes(const TensorView& view, int code, std::initializer_list<int64_t> sizes) {
  return view.code == code && std::equal(sizes.begin(), sizes.end(), view.sizes);
}

// Reads what the forward returned and what came in for it; false where something does not fit.
bool read_incoming(const PlainGradients& g, bool bshd, BackwardParams& b) {
  AttentionParams& p = b.forward;
  const std::initializer_list<int64_t> rows = {p.batch, p.query_heads, p.seqlen_q};
  const std::initializer_list<int64_t> elements = {p.batch, p.query_heads, p.seqlen_q, p.value_dim};
  const int code = static_cast<int>(p.dtype);
  const int wide = static_cast<int>(lse_dtype(p.dtype));
  TensorView out;
  TensorView lse;
  TensorView grad_out;
  TensorView grad_lse;
  if (!read_torch(g.out, TensorView::kMaxRank, out) || !read_torch(g.grad_out, TensorView::kMaxRank, grad_out) ||
      !read_torch(g.lse, 3, lse)) {
    return false;
  }
  if (bshd) {
    swap_heads_and_rows(out);
    swap_heads_and_rows(grad_out);
  }
  if (!has_sizes(out, code, elements) || !has_sizes(grad_out, code, elements) || !has_sizes(lse, wide, rows)) {
    return false;
  }
  if (!g.grad_lse.is_none()) {
    if (!read_torch(g.grad_lse, 3, grad_lse) || !has_sizes(grad_lse, wide, rows)) {
      return false;
    }
    b.grad_lse = grad_lse.data;
    std::copy_n(grad_lse.strides, 3, b.grad_lse_strides);
  }
  for (const TensorView* view : {&out, &lse, &grad_out}) {
    check_view("out, lse, grad_out", *view);
  }
  set_out(out, p);
  set_lse(lse, p);
  b.grad_out = grad_out.data;
  std::copy_n(grad_out.strides, 4, b.grad_out_strides);
  return true;
}

}  // namespace

py::object attention_plain_numpy(py::handle query, py::handle key, py::handle value, py::handle kv_lengths, bool causal,
                                 py::handle scale, bool bshd, int num_threads) {
  PlainCall c;
  TensorView out;
  if (!read_plain(query, key, value, causal, scale, bshd, num_threads, read_array, c) ||
      !read_kv_lengths(kv_lengths, read_numpy, c) || !shape_result(c.own, c.value.sizes[3], out)) {
    return py::none();
  }
  py::object result = empty_result(query, c.own, out);
  set_result(out, bshd, c.params);
  const ForwardFn run = forward_kernel(c.params);
  return keeping(std::move(result), [&] { run(&c.params, 1); });
}

py::object attention_plain_torch(py::handle query, py::handle key, py::handle value, py::handle kv_lengths, bool causal,
                                 py::handle scale, bool bshd, bool return_lse, int num_threads) {
  PlainCall c;
  TensorView out;
  if (!read_plain(query, key, value, causal, scale, bshd, num_threads, read_torch, c) ||
      !read_kv_lengths(kv_lengths, read_torch_any, c) || !shape_result(c.own, c.value.sizes[3], out)) {
    return py::none();
  }
  AttentionParams& p = c.params;
  py::object result = empty_result(query, c.own, out);
  set_result(out, bshd, p);
  if (return_lse) {
    TensorView lse;
    py::object log_sums = empty_lse(query, p, lse);
    set_lse(lse, p);
    result = py::make_tuple(std::move(result), std::move(log_sums));
  }
  const ForwardFn run = forward_kernel(p);
  return keeping(std::move(result), [&] { run(&p, 1); });
}

py::object attention_plain_backward(const PlainGradients& g, py::handle query, py::handle key, py::handle value,
                                    bool causal, py::handle scale, bool bshd, int num_threads) {
  PlainCall c;
  BackwardParams b{};
  if (!read_plain(query, key, value, causal, scale, bshd, num_threads, read_torch, c)) {
    return py::none();
  }
  b.forward = c.params;
  if (!read_incoming(g, bshd, b)) {
    return py::none();
  }
  py::object grad_query = py::none();
  py::object grad_key = py::none();
  py::object grad_value = py::none();
  if (g.of_query) {
    grad_query = empty_gradient(query, c.query, bshd, b.grad_query, b.grad_query_strides);
  }
  if (g.of_key) {
    grad_key = empty_gradient(key, c.key, bshd, b.grad_key, b.grad_key_strides);
  }
  if (g.of_value) {
    grad_value = empty_gradient(value, c.value, bshd, b.grad_value, b.grad_value_strides);
  }
  const BackwardFn run = kernels().backward[static_cast<int>(b.forward.dtype)];
  return keeping(py::make_tuple(std::move(grad_query), std::move(grad_key), std::move(grad_value)),
                 [&] { run(&b, 1); });
}

}  // namespace fastattn
