// What the scalar loops know of one query row: what it sees, and its scores, in double precision.
#pragma once

#include <cmath>
#include <limits>

#include "algorithm/bytes.h"
#include "dropout.h"
#include "params.h"

namespace fastattn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
double load(const void* base, int64_t index) {
  return to_scalar(static_cast<const T*>(base)[index]);
}

template <class T>
void store(void* base, int64_t index, double x) {
  from_scalar(x, static_cast<T*>(base) + index);
}

// One query row of one head.
struct Row {
  int64_t batch;
  int64_t head;
  int64_t kv_head;
  int64_t row;
  int64_t position;  // row + query offset
};

inline Row row_at(const AttentionParams& p, int64_t index) {
  const int64_t row = index % p.seqlen_q;
  const int64_t head = index / p.seqlen_q % p.query_heads;
  const int64_t batch = index / p.seqlen_q / p.query_heads;
  return {batch, head, head / (p.query_heads / p.kv_heads), row, row + p.query_offset[batch]};
}

inline int64_t offset(const int64_t (&strides)[4], const Row& r, int64_t column) {
  return r.batch * strides[0] + r.head * strides[1] + r.row * strides[2] + column * strides[3];
}

template <class T>
double bias_at(const AttentionParams& p, const Row& r, int64_t key) {
  const int64_t index = offset(p.bias_strides, r, key);
  return p.bias_dtype == DType::float32 ? load<float>(p.bias, index) : load<T>(p.bias, index);
}

template <class T>
bool visible(const AttentionParams& p, const Row& r, int64_t key) {
  if (p.kv_lengths != nullptr && key >= p.kv_lengths[r.batch]) {
    return false;
  }
  if (p.kv_starts != nullptr && key < p.kv_starts[r.batch]) {
    return false;
  }
  if (p.query_lengths != nullptr && r.row >= p.query_lengths[r.batch]) {
    return false;
  }
  if (p.query_segments != nullptr && p.query_segments[r.batch * p.segment_strides[0] + r.row] !=
                                         p.key_segments[r.batch * p.segment_strides[1] + key]) {
    return false;
  }
  if (p.window_right < kUnbounded && key > r.position + p.window_right) {
    return false;
  }
  if (p.window_left < kUnbounded && key < r.position - p.window_left) {
    return false;
  }
  if (p.mask != nullptr && p.mask[offset(p.mask_strides, r, key)] == 0) {
    return false;
  }
  return p.bias == nullptr || bias_at<T>(p, r, key) != -kInfinity;
}

// What dropout multiplies a probability by.
inline double kept(const AttentionParams& p, const Row& r, int64_t key) {
  if (p.dropout.threshold == 0) {
    return 1;
  }
  uint32_t words[4][1] = {{static_cast<uint32_t>(r.row)},
                          {static_cast<uint32_t>(key / 4)},
                          {static_cast<uint32_t>(p.dropout.first_head + r.batch * p.query_heads + r.head)},
                          {p.dropout.offset}};
  philox<1>(words, p.dropout.seed);
  return kept(p.dropout, words[key % 4][0]);
}

// A row of keys or values: where its columns start, and what multiplies them.
struct CachedRow {
  int64_t start;
  double scale;
};

inline CachedRow cached_row(const AttentionParams& p, const int64_t (&strides)[4], const float* scales,
                            const int64_t (&scale_strides)[3], const Row& r, int64_t key) {
  int64_t outer = r.batch;
  if (p.block_table != nullptr) {
    outer = p.block_table[r.batch * p.block_table_stride + key / p.page_size];
    key %= p.page_size;
  }
  const double scale =
      scales == nullptr ? 1 : scales[outer * scale_strides[0] + r.kv_head * scale_strides[1] + key * scale_strides[2]];
  return {outer * strides[0] + r.kv_head * strides[1] + key * strides[2], scale};
}

inline CachedRow key_row(const AttentionParams& p, const Row& r, int64_t key) {
  return cached_row(p, p.key_strides, p.key_scales, p.key_scale_strides, r, key);
}

inline CachedRow value_row(const AttentionParams& p, const Row& r, int64_t key) {
  return cached_row(p, p.value_strides, p.value_scales, p.value_scale_strides, r, key);
}

// An element of a key or a value, times the scale of its row.
template <class T>
double load_cached(const AttentionParams& p, const void* base, const CachedRow& row, int64_t stride, int64_t column) {
  const int64_t index = row.start + column * stride;
  switch (p.kv_dtype) {
    case DType::int8:
      return row.scale * load<Int8>(base, index);
    case DType::float8_e4m3fn:
      return row.scale * load<Float8E4M3>(base, index);
    case DType::float8_e5m2:
      return row.scale * load<Float8E5M2>(base, index);
    default:
      return load<T>(base, index);
  }
}

// scale * <q, k>
template <class T>
double product(const AttentionParams& p, const Row& r, int64_t key) {
  double dot = 0;
  const CachedRow row = key_row(p, r, key);
  for (int64_t d = 0; d < p.head_dim; ++d) {
    dot += load<T>(p.query, offset(p.query_strides, r, d)) * load_cached<T>(p, p.key, row, p.key_strides[3], d);
  }
  return dot * p.scale;
}

template <class T>
double score(const AttentionParams& p, const Row& r, int64_t key) {
  double s = product<T>(p, r, key);
  if (p.softcap > 0) {
    s = p.softcap * std::tanh(s / p.softcap);
  }
  if (p.bias != nullptr) {
    s += bias_at<T>(p, r, key);
  }
  if (p.alibi_slopes != nullptr) {
    const double slope = p.alibi_slopes[r.batch * p.alibi_strides[0] + r.head * p.alibi_strides[1]];
    s -= slope * std::fabs(static_cast<double>(r.position - key));
  }
  return s;
}

}  // namespace
}  // namespace fastattn
