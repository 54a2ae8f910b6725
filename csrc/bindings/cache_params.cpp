#include "bindings/cache_params.h"

#include <algorithm>
#include <string>

namespace py = pybind11;

namespace fastattn {
namespace {

bool is_there(const TensorView& view) { return view.rank != 0; }

bool is_quantised(DType dtype) { return dtype >= DType::int8 && dtype <= DType::float8_e5m2; }

const int64_t* read_positions(const char* name, const TensorView& view, int64_t batch) {
  return static_cast<const int64_t*>(numbers_of(name, view, kCodeInt64, batch));
}

void expect_positions(const char* name, const int64_t* start, int64_t batch, int64_t rows, int64_t limit) {
  for (int64_t b = 0; b < batch && rows > 0; ++b) {
    if (start[b] < 0 || start[b] > limit - rows) {
      fail(name, "sequence " + std::to_string(b) + " has positions from " + std::to_string(start[b]) + ", expected " +
                     std::to_string(rows) + " of them within 0.." + std::to_string(limit - 1));
    }
  }
}

CacheRows set_rows(const char* name, const TensorView& rows, const TensorView& cache, const TensorView& scales,
                   bool quantised) {
  CacheRows r{};
  r.rows = rows.data;
  r.cache = cache.data;
  r.dim = rows.sizes[3];
  copy_strides(rows, r.strides);
  copy_strides(cache, r.cache_strides);
  if (r.dim < 1 || r.dim > kMaxHeadDim) {
    fail(name, "its last axis must be within 1.." + std::to_string(kMaxHeadDim));
  }
  if (quantised != is_there(scales)) {
    fail(name, "expected scales with 8-bit numbers, and none with others");
  }
  if (quantised) {
    expect_code(name, scales, static_cast<int>(DType::float32));
    expect_sizes(name, scales, {cache.sizes[0], cache.sizes[1], cache.sizes[2]});
    r.scales = static_cast<float*>(scales.data);
    copy_strides(scales, r.scale_strides);
  }
  return r;
}

void set_pages(const TensorView& table, const TensorView& cache, CacheUpdateParams& p, Pages& pages) {
  expect_table(table, p.batch);
  p.page_size = cache.sizes[2];
  if (p.page_size < 1 || (p.capacity - 1) / p.page_size >= table.sizes[1]) {
    fail("capacity", "is more than the pages of a sequence hold");
  }
  p.block_table_stride = 1;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t last = std::min(p.start[b] + p.new_rows, p.capacity) - 1;
    p.block_table_stride = std::max(p.block_table_stride, last / p.page_size + 1);
  }
  pages.assign(static_cast<size_t>(p.batch * p.block_table_stride), 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < p.new_rows; ++i) {
      const int64_t slot = (p.start[b] + i) % p.capacity / p.page_size;
      pages[static_cast<size_t>(b * p.block_table_stride + slot)] = page_at(table, b, slot, cache.sizes[0]);
    }
  }
  p.block_table = pages.data();
}

void set_new_rows(const CacheViews& v, CacheUpdateParams& p, Pages& pages) {
  const TensorView& key = v.new_key;
  const TensorView& value = v.new_value;
  expect_code("new_key", key, static_cast<int>(p.dtype));
  expect_code("new_value", value, static_cast<int>(p.dtype));
  expect_code("value_cache", v.value_cache, v.key_cache.code);
  p.cache_dtype = static_cast<DType>(v.key_cache.code);
  const bool quantised = is_quantised(p.cache_dtype);
  if (!quantised) {
    expect_code("key_cache", v.key_cache, static_cast<int>(p.dtype));
  }
  p.kv_heads = key.sizes[1];
  p.new_rows = key.sizes[2];
  expect_sizes("new_key", key, {p.batch, p.kv_heads, p.new_rows, key.sizes[3]});
  expect_sizes("new_value", value, {p.batch, p.kv_heads, p.new_rows, value.sizes[3]});
  const TensorView& cache = v.key_cache;
  expect_sizes("key_cache", cache, {cache.sizes[0], p.kv_heads, cache.sizes[2], key.sizes[3]});
  expect_sizes("value_cache", v.value_cache, {cache.sizes[0], p.kv_heads, cache.sizes[2], value.sizes[3]});
  p.key = set_rows("new_key", key, cache, v.key_scales, quantised);
  p.value = set_rows("new_value", value, v.value_cache, v.value_scales, quantised);
  p.start = read_positions("start", v.start, p.batch);
  if (p.new_rows == 0 || p.batch == 0) {
    return;
  }
  if (p.capacity < p.new_rows) {
    fail("capacity", "must hold the new rows");
  }
  expect_positions("start", p.start, p.batch, p.new_rows, kUnbounded);
  if (is_there(v.block_table)) {
    set_pages(v.block_table, cache, p, pages);
  } else if (cache.sizes[0] != p.batch || cache.sizes[2] < p.capacity) {
    fail("key_cache", "must have a batch of caches with room for the capacity");
  }
}

void set_rotary(const CacheViews& v, CacheUpdateParams& p) {
  RotaryTable& r = p.rotary;
  r.dtype = static_cast<DType>(v.cos.code);
  if (r.dtype != p.dtype && r.dtype != DType::float32) {
    fail("cos", "dtype code " + std::to_string(v.cos.code) + ", expected the query's or float32");
  }
  expect_code("sin", v.sin, v.cos.code);
  expect_sizes("sin", v.sin, {v.cos.sizes[0], v.cos.sizes[1]});
  r.cos = v.cos.data;
  r.sin = v.sin.data;
  copy_strides(v.cos, r.cos_strides);
  copy_strides(v.sin, r.sin_strides);
  r.pairs = v.cos.sizes[1];
  r.interleaved = v.interleaved;
  if (p.head_dim < 2 * r.pairs || p.head_dim > kMaxHeadDim || (p.key.rows != nullptr && p.key.dim != p.head_dim)) {
    fail("cos", "its pairs of columns must be those of the heads");
  }
  expect_positions("cos", p.start, p.batch, p.new_rows, v.cos.sizes[0]);
  if (!is_there(v.turned_query)) {
    return;
  }
  expect_code("turned_query", v.turned_query, v.query.code);
  expect_sizes("turned_query", v.turned_query, {p.batch, p.query_heads, p.seqlen_q, p.head_dim});
  p.query = v.query.data;
  p.turned_query = v.turned_query.data;
  copy_strides(v.query, p.query_strides);
  copy_strides(v.turned_query, p.turned_strides);
  p.query_start = read_positions("query_start", v.query_start, p.batch);
  p.query_step = v.query_step;
  const int64_t span = p.seqlen_q == 0 ? 0 : 1 + (p.seqlen_q - 1) * v.query_step;
  if (v.query_step != 0 && v.query_step != 1) {
    fail("query_step", "must be 0 or 1");
  }
  expect_positions("cos", p.query_start, p.batch, span, v.cos.sizes[0]);
}

}  // namespace

CacheUpdateParams make_cache_update(const CacheViews& v, Pages& pages) {
  CacheUpdateParams p{};
  const TensorView& query = v.query;
  if (query.code < 0 || query.code > static_cast<int>(DType::float16)) {
    fail("query", "dtype code " + std::to_string(query.code) + " is not one of float32, float64, bfloat16, float16");
  }
  p.dtype = static_cast<DType>(query.code);
  p.batch = query.sizes[0];
  p.query_heads = query.sizes[1];
  p.seqlen_q = query.sizes[2];
  p.head_dim = query.sizes[3];
  p.capacity = v.capacity;
  if (is_there(v.new_key)) {
    set_new_rows(v, p, pages);
  }
  if (is_there(v.cos)) {
    set_rotary(v, p);
  }
  return p;
}

void read_cache_views(const py::tuple& tensors, CacheViews& v) {
  struct Entry {
    const char* name;
    int rank;
    TensorView* view;
  };
  const Entry entries[] = {
      {"new_key", 4, &v.new_key},
      {"new_value", 4, &v.new_value},
      {"key_cache", 4, &v.key_cache},
      {"value_cache", 4, &v.value_cache},
      {"key_scales", 3, &v.key_scales},
      {"value_scales", 3, &v.value_scales},
      {"start", 1, &v.start},
      {"block_table", 2, &v.block_table},
      {"cos", 2, &v.cos},
      {"sin", 2, &v.sin},
      {"query", 4, &v.query},
      {"turned_query", 4, &v.turned_query},
      {"query_start", 1, &v.query_start},
  };
  size_t i = 0;
  for (const Entry& entry : entries) {
    const py::object from = tensors[i++];
    if (!from.is_none()) {
      *entry.view = read_tuple(entry.name, from, entry.rank);
    }
  }
}

}  // namespace fastattn
