#include "bindings/cache_call.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/cache_params.h"
#include "bindings/gil.h"
#include "bindings/plain_arrays.h"
#include "bindings/torch_tensors.h"
#include "dispatch.h"
#include "workspace.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// A call, read. The parameters point into it, so it may not move.
struct CachedCall {
  CacheViews views;  // axes (B or pages, H, L, D) whatever the layout
  TensorView own;    // query, with its axes as they came
  TensorView table;  // as given
  int64_t added = 0;
  std::vector<int64_t> start, lengths, offsets, query_start;
  std::vector<int64_t> ring;  // the table of a rolling cache, twice over
  std::vector<double> slopes, sinks;
  Pages pages, written_pages;
  AttentionParams params{};
  CacheUpdateParams update{};
};

bool read_rank(ReadFn read, py::handle from, int rank, bool bshd, TensorView& view) {
  if (!read(from, rank, view)) {
    return false;
  }
  check_view("", view);
  if (bshd && rank > 2) {
    swap_heads_and_rows(view);
  }
  return true;
}

bool read_optional(ReadFn read, py::handle from, int rank, bool bshd, TensorView& view) {
  return from.is_none() || read_rank(read, from, rank, bshd, view);
}

// Tensors have no such flag.
bool may_write(const CachedArguments& a) {
  for (const py::handle array : {a.key_cache, a.value_cache, a.key_scale, a.value_scale}) {
    if (is_numpy(array) && !py::reinterpret_borrow<py::array>(array).writeable()) {
      return false;
    }
  }
  return true;
}

bool read_arrays(const CachedArguments& a, ReadFn read, CachedCall& c) {
  CacheViews& v = c.views;
  if (!read(a.query, TensorView::kMaxRank, c.own) || !read_rank(read, a.query, 4, a.bshd, v.query) ||
      !read_rank(read, a.key_cache, 4, a.bshd, v.key_cache) ||
      !read_rank(read, a.value_cache, 4, a.bshd, v.value_cache) || is_empty(v.query) || is_empty(v.key_cache) ||
      is_empty(v.value_cache)) {
    return false;
  }
  return read_optional(read, a.new_key, 4, a.bshd, v.new_key) &&
         read_optional(read, a.new_value, 4, a.bshd, v.new_value) &&
         read_optional(read, a.key_scale, 3, a.bshd, v.key_scales) &&
         read_optional(read, a.value_scale, 3, a.bshd, v.value_scales) &&
         read_optional(read, a.rotary_cos, 2, false, v.cos) && read_optional(read, a.rotary_sin, 2, false, v.sin) &&
         read_optional(read, a.block_table, 2, false, c.table) && (v.new_key.rank == 0) == (v.new_value.rank == 0) &&
         (v.new_key.rank == 0 || (!is_empty(v.new_key) && may_write(a))) && (v.cos.rank == 0) == (v.sin.rank == 0);
}

// A vector view over numbers that are ours.
TensorView view_of(const std::vector<int64_t>& numbers) {
  TensorView view;
  view.data = const_cast<int64_t*>(numbers.data());
  view.code = kCodeInt64;
  view.rank = 1;
  view.sizes[0] = static_cast<int64_t>(numbers.size());
  view.strides[0] = 1;
  return view;
}

// The lengths of `batch` caches: given one by one, as one number for all, or not at all.
bool read_cache_lengths(py::handle from, ReadFn read, int64_t otherwise, int64_t limit, int64_t batch,
                        std::vector<int64_t>& lengths) {
  if (!from.is_none() && !PyLong_CheckExact(from.ptr())) {
    return read_lengths(from, read, batch, limit, lengths);
  }
  int overflow = 0;
  const int64_t length = from.is_none() ? otherwise : PyLong_AsLongLongAndOverflow(from.ptr(), &overflow);
  lengths.assign(static_cast<size_t>(batch), length);
  return overflow == 0 && length >= 0 && length <= limit;
}

bool read_bound(PyObject* from, int64_t& bound) {
  if (from == Py_None) {
    bound = kUnbounded;
    return true;
  }
  int overflow = 0;
  bound = PyLong_CheckExact(from) ? PyLong_AsLongLongAndOverflow(from, &overflow) : -1;
  return overflow == 0 && bound >= 0 && bound <= kUnbounded;
}

bool read_window(const CachedArguments& a, AttentionParams& p) {
  p.window_left = p.window_right = kUnbounded;
  PyObject* const window = a.window.ptr();
  if (window != Py_None && (!PyTuple_CheckExact(window) || PyTuple_GET_SIZE(window) != 2 ||
                            !read_bound(PyTuple_GET_ITEM(window, 0), p.window_left) ||
                            !read_bound(PyTuple_GET_ITEM(window, 1), p.window_right))) {
    return false;
  }
  p.window_right = a.causal ? 0 : p.window_right;
  return true;
}

// (H,) float32 or float64 numbers as doubles.
bool read_numbers(py::handle from, ReadFn read, int64_t heads, std::vector<double>& numbers) {
  TensorView view;
  if (from.is_none()) {
    return true;
  }
  if (!read(from, 1, view) || view.sizes[0] != heads || view.code > static_cast<int>(DType::float64)) {
    return false;
  }
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t at = h * view.strides[0];
    numbers.push_back(view.code == static_cast<int>(DType::float32) ? static_cast<const float*>(view.data)[at]
                                                                    : static_cast<const double*>(view.data)[at]);
  }
  return std::all_of(numbers.begin(), numbers.end(), [](double x) { return std::isfinite(x); });
}

bool read_rules(const CachedArguments& a, ReadFn read, CachedCall& c) {
  AttentionParams& p = c.params;
  const int64_t heads = c.views.query.sizes[1];
  p.softcap = PyFloat_CheckExact(a.softcap.ptr()) ? PyFloat_AS_DOUBLE(a.softcap.ptr()) : -1;
  if (!std::isfinite(p.softcap) || p.softcap < 0 || !read_scale(a.scale, c.views.query.sizes[3], p.scale) ||
      !read_window(a, p) || !read_numbers(a.alibi_slopes, read, heads, c.slopes) ||
      !read_numbers(a.sinks, read, heads, c.sinks)) {
    return false;
  }
  p.alibi_slopes = c.slopes.empty() ? nullptr : c.slopes.data();
  p.alibi_strides[0] = 0;
  p.alibi_strides[1] = 1;
  p.sinks = c.sinks.empty() ? nullptr : c.sinks.data();
  return true;
}

// The table of a ring twice over, so that positions run on where it begins again; a ring in one piece is a page.
void make_ring(CachedCall& c, int64_t batch) {
  const int64_t slots = c.table.rank == 0 ? 1 : c.table.sizes[1];
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < 2 * slots; ++i) {
      c.ring.push_back(
          c.table.rank == 0 ? b : integer_at(c.table, b * c.table.strides[0] + i % slots * c.table.strides[1]));
    }
  }
  c.table = view_of(c.ring);
  c.table.rank = 2;
  c.table.sizes[0] = batch;
  c.table.sizes[1] = 2 * slots;
  c.table.strides[0] = 2 * slots;
  c.table.strides[1] = 1;
}

// Where sequences end, and what their queries attend to; false where a length has no room.
bool place(const CachedArguments& a, ReadFn read, CachedCall& c) {
  CacheViews& v = c.views;
  AttentionParams& p = c.params;
  const int64_t batch = v.query.sizes[0];
  const int64_t seqlen_q = v.query.sizes[2];
  c.added = v.new_key.rank == 0 ? 0 : v.new_key.sizes[2];
  v.capacity = v.key_cache.sizes[2];
  if (c.table.rank != 0) {
    if (!holds_integers(c.table) || c.table.sizes[0] != batch || c.table.sizes[1] > kMaxElements / v.capacity) {
      return false;
    }
    v.capacity *= c.table.sizes[1];
  }
  if (a.rolling && (p.window_left == kUnbounded || v.capacity < p.window_left + seqlen_q || v.capacity < c.added)) {
    return false;
  }
  const int64_t limit = a.rolling ? int64_t{1} << 60 : v.capacity - c.added;
  if (!read_cache_lengths(a.cache_seqlens, read, c.added == 0 ? v.capacity : 0, limit, batch, c.start)) {
    return false;
  }
  for (const int64_t start : c.start) {
    const int64_t length = start + c.added;
    const int64_t begin = a.rolling && length > v.capacity ? (length - v.capacity) / v.capacity * v.capacity : 0;
    c.query_start.push_back(length - seqlen_q);
    c.lengths.push_back(length - begin);
    c.offsets.push_back(length - begin - seqlen_q);
  }
  if (a.rolling) {
    make_ring(c, batch);
  }
  if (c.table.rank != 0) {
    set_paged_inputs(v.query, v.key_cache, v.value_cache, c.table, c.lengths.data(), p, c.pages);
  } else {
    set_inputs(v.query, v.key_cache, v.value_cache, p);
    p.kv_lengths = c.lengths.data();
  }
  p.query_offset = c.offsets.data();
  if ((p.kv_dtype != p.dtype) != (v.key_scales.rank != 0) || (p.kv_dtype != p.dtype) != (v.value_scales.rank != 0)) {
    return false;
  }
  if (v.key_scales.rank != 0) {
    set_scales("", v.key_scales, v.key_cache, p.key_scales, p.key_scale_strides);
    set_scales("", v.value_scales, v.value_cache, p.value_scales, p.value_scale_strides);
  }
  return true;
}

struct Span {
  uintptr_t begin, end;
};

int64_t item_size(int code) {
  return code == kCodeInt64 ? 8 : code == kCodeInt32 ? 4 : size_of(static_cast<DType>(code));
}

Span span_of(const TensorView& view) {
  int64_t last = 0;
  for (int i = 0; i < view.rank; ++i) {
    last += (view.sizes[i] - 1) * view.strides[i];
  }
  const auto begin = reinterpret_cast<uintptr_t>(view.data);
  return {begin, begin + static_cast<uintptr_t>((last + 1) * item_size(view.code))};
}

// Whether some axis, taken from the finest on, does not step past all that the finer ones reach.
bool overlaps_itself(const TensorView& view) {
  int axes[TensorView::kMaxRank] = {0, 1, 2, 3};
  for (int i = 1; i < view.rank; ++i) {
    for (int j = i; j > 0 && view.strides[axes[j]] < view.strides[axes[j - 1]]; --j) {
      std::swap(axes[j], axes[j - 1]);
    }
  }
  int64_t reach = 0;
  for (int i = 0; i < view.rank; ++i) {
    const int64_t size = view.sizes[axes[i]];
    const int64_t stride = view.strides[axes[i]];
    if (size > 1 && stride <= reach) {
      return true;
    }
    reach += size > 1 ? stride * (size - 1) : 0;
  }
  return false;
}

// Whether what is written lies apart from itself and from all that is read.
bool lies_apart(const CacheViews& v) {
  const TensorView* const views[] = {&v.key_cache, &v.value_cache, &v.key_scales, &v.value_scales, &v.query,
                                     &v.new_key,   &v.new_value,   &v.cos,        &v.sin};
  constexpr int kWritten = 4;
  for (int i = 0; i < kWritten; ++i) {
    if (views[i]->rank == 0) {
      continue;
    }
    if (overlaps_itself(*views[i])) {
      return false;
    }
    const Span written = span_of(*views[i]);
    for (int j = i + 1; j < static_cast<int>(std::size(views)); ++j) {
      const Span other = span_of(*views[j]);
      if (views[j]->rank != 0 && written.begin < other.end && other.begin < written.end) {
        return false;
      }
    }
  }
  return true;
}

// Whether no two new rows go to one place.
bool targets_differ(const CacheUpdateParams& u) {
  if (u.block_table == nullptr || u.new_rows == 0) {
    return true;
  }
  std::vector<int64_t> rows;
  rows.reserve(static_cast<size_t>(u.batch * u.new_rows));
  for (int64_t b = 0; b < u.batch; ++b) {
    for (int64_t i = 0; i < u.new_rows; ++i) {
      const int64_t at = (u.start[b] + i) % u.capacity;
      rows.push_back(u.block_table[b * u.block_table_stride + at / u.page_size] * u.page_size + at % u.page_size);
    }
  }
  std::sort(rows.begin(), rows.end());
  return std::adjacent_find(rows.begin(), rows.end()) == rows.end();
}

// Everything but memory for the results; false where something does not fit.
bool read_call(const CachedArguments& a, ReadFn read, CachedCall& c) {
  try {
    if (!read_arrays(a, read, c) || !read_rules(a, read, c) || !place(a, read, c)) {
      return false;
    }
    CacheViews& v = c.views;
    if (v.new_key.rank == 0 && v.cos.rank == 0) {
      return true;
    }
    v.start = view_of(c.start);
    v.block_table = c.table;
    v.interleaved = a.rotary_interleaved;
    const AttentionParams& p = c.params;
    if (v.cos.rank != 0) {
      v.query_start = view_of(c.query_start);
      v.query_step = p.window_left != kUnbounded || p.window_right != kUnbounded ? 1 : 0;
      v.turned_query = v.query;
      v.turned_query.strides[3] = 1;
      v.turned_query.strides[2] = p.head_dim;
      v.turned_query.strides[1] = p.head_dim * p.seqlen_q;
      v.turned_query.strides[0] = p.head_dim * p.seqlen_q * p.query_heads;
    }
    c.update = make_cache_update(v, c.written_pages);
    return (c.added == 0 || lies_apart(v)) && targets_differ(c.update);
  } catch (const std::invalid_argument&) {
    return false;
  }
}

size_t turned_bytes(const CachedCall& c) {
  const AttentionParams& p = c.params;
  return c.views.cos.rank == 0
             ? 0
             : static_cast<size_t>(p.batch * p.query_heads * p.seqlen_q * p.head_dim * item_size(c.views.query.code));
}

// Writes rows and turns queries, which then lie in `scratch`; then attends.
void compute(CachedCall& c, char* scratch) {
  AttentionParams& p = c.params;
  if (c.update.query != nullptr) {
    c.update.turned_query = scratch;
    p.query = scratch;
    std::copy_n(c.update.turned_strides, 4, p.query_strides);
  }
  if (c.added != 0 || c.update.query != nullptr) {
    update_caches(c.update);
  }
  forward_kernel(p)(&p, 1);
}

}  // namespace

py::object attention_cached(const CachedArguments& a, int num_threads) {
  const bool torch = !is_numpy(a.query);
  const ReadFn read = torch ? read_torch_any : read_numpy;
  CachedCall c;
  TensorView out;
  if ((a.return_lse && !torch) || !read_call(a, read, c) || !shape_result(c.own, c.views.value_cache.sizes[3], out)) {
    return py::none();
  }
  AttentionParams& p = c.params;
  p.num_threads = c.update.num_threads = num_threads;
  const Workspace scratch(turned_bytes(c) + 1);
  py::object result = empty_result(a.query, c.own, out);
  set_result(out, a.bshd, p);
  if (a.return_lse) {
    TensorView lse;
    py::object log_sums = empty_lse(a.query, p, lse);
    set_lse(lse, p);
    result = py::make_tuple(std::move(result), std::move(log_sums));
  }
  return keeping(std::move(result), [&] { compute(c, scratch.data()); });
}

}  // namespace fastattn
