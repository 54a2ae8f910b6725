// Makes CacheUpdateParams of views, checking all that memory safety asks for: sizes that agree, positions within
// capacities and tables, pages that are there.
#pragma once

#include "bindings/make_params.h"
#include "cache_update.h"

namespace fastattn {

// The tensors of an update; a rank of 0 stands for one that is not there.
struct CacheViews {
  TensorView new_key, new_value;        // (B, Hkv, Ln, D or Dv)
  TensorView key_cache, value_cache;    // (B or pages, Hkv, rows, D or Dv)
  TensorView key_scales, value_scales;  // (B or pages, Hkv, rows)
  TensorView start;                     // (B,): the position of the first new row
  TensorView block_table;               // (B, slots)
  TensorView cos, sin;                  // (positions, pairs)
  TensorView query, turned_query;       // (B, Hq, Lq, D)
  TensorView query_start;               // (B,): the position of query 0
  int64_t capacity = 0;
  int64_t query_step = 0;
  bool interleaved = false;
};

// Throws std::invalid_argument. The parameters point into `pages`, and to the numbers of `start` and `query_start`.
CacheUpdateParams make_cache_update(const CacheViews& views, Pages& pages);

// The same from tuples or None, in the order of CacheViews.
void read_cache_views(const pybind11::tuple& tensors, CacheViews& views);

}  // namespace fastattn
