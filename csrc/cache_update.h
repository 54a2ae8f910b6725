// What a decode step does before it attends: new keys and values are written into caches, in one piece or in pages,
// quantised if the caches are, and keys and queries are turned by a rotary embedding. Portable code: it moves memory.
#pragma once

#include <cstdint>

#include "params.h"

namespace fastattn {

// Keys, or values. Strides count elements.
struct CacheRows {
  const void* rows;  // (B, Hkv, Ln, dim)
  int64_t strides[4];
  void* cache;  // (B or pages, Hkv, rows, dim)
  int64_t cache_strides[4];
  float* scales;  // null, or (B or pages, Hkv, rows): what multiplies a row of codes
  int64_t scale_strides[3];
  int64_t dim;
};

// Cosines and sines, a row a position; `pairs` of columns turn, the rest stays.
struct RotaryTable {
  DType dtype;
  const void* cos;  // null: no embedding
  const void* sin;
  int64_t cos_strides[2];
  int64_t sin_strides[2];
  int64_t pairs;
  bool interleaved;  // pairs are columns (2i, 2i + 1), else (i, i + pairs)
};

struct CacheUpdateParams {
  DType dtype;        // of new rows and queries
  DType cache_dtype;  // the same, or one of those that a scale multiplies
  int64_t batch;
  int64_t kv_heads;
  int64_t new_rows;  // Ln, may be 0
  CacheRows key;
  CacheRows value;
  const int64_t* start;        // (B,): the position of the first new row
  int64_t capacity;            // position p is at row p % capacity of its sequence's cache
  const int64_t* block_table;  // null, or (B, slots): the pages of a sequence, as far as they are written
  int64_t block_table_stride;
  int64_t page_size;

  RotaryTable rotary;
  int64_t query_heads;
  int64_t seqlen_q;
  int64_t head_dim;
  const void* query;  // null where queries stay as they are
  int64_t query_strides[4];
  void* turned_query;
  int64_t turned_strides[4];
  const int64_t* query_start;  // (B,): the position of query 0
  int64_t query_step;          // 0: all queries of a sequence are turned as the first

  int32_t num_threads;
};

// Positions and pages must have been checked.
void update_caches(const CacheUpdateParams& params);

}  // namespace fastattn
