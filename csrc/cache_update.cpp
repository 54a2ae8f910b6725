#include "cache_update.h"

#include <limits>
#include <type_traits>

#include "algorithm/bytes.h"
#include "parallel.h"

namespace fastattn {
namespace {

// A task writes so many bytes at least: waking a thread takes microseconds, in which one copies about as much.
constexpr int64_t kTaskBytes = 64 << 10;

// What rows are computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
void load_row(const T* from, int64_t stride, int64_t dim, Wide<T>* to) {
  if (stride == 1) {
    for (int64_t d = 0; d < dim; ++d) {
      to[d] = to_scalar(from[d]);
    }
    return;
  }
  for (int64_t d = 0; d < dim; ++d) {
    to[d] = to_scalar(from[d * stride]);
  }
}

template <class T>
void store_row(const Wide<T>* from, int64_t dim, T* to, int64_t stride) {
  if (stride == 1) {
    for (int64_t d = 0; d < dim; ++d) {
      from_scalar(from[d], to + d);
    }
    return;
  }
  for (int64_t d = 0; d < dim; ++d) {
    from_scalar(from[d], to + d * stride);
  }
}

// No arithmetic: bits stay as they are, those of a NaN too.
template <class T>
void copy_row(const T* from, int64_t stride, int64_t dim, T* to, int64_t to_stride) {
  if (stride == 1 && to_stride == 1) {
    memcpy(to, from, static_cast<size_t>(dim) * sizeof(T));
    return;
  }
  for (int64_t d = 0; d < dim; ++d) {
    to[d * to_stride] = from[d * stride];
  }
}

// The scale makes the row's largest magnitude the largest code. Magnitudes are compared as integers, in whose order a
// NaN is above every number. A row that is not finite has a scale of NaN, and a row of zeros one of 0.
template <class Code>
float quantise_row(const float* from, int64_t dim, Code* to, int64_t stride) {
  int32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const auto magnitude = static_cast<int32_t>(float_to_bits(from[d]) & 0x7fffffffU);
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool finite = largest < 0x7f800000;
  const float scale = bits_to_float(static_cast<uint32_t>(largest)) / kLargestCode<Code>;
  if (!finite || !(scale > 0)) {
    for (int64_t d = 0; d < dim; ++d) {
      to[d * stride] = Code{0};
    }
    return finite ? scale : std::numeric_limits<float>::quiet_NaN();
  }
  if (stride == 1) {
    for (int64_t d = 0; d < dim; ++d) {
      from_float(from[d] / scale, to + d);
    }
    return scale;
  }
  for (int64_t d = 0; d < dim; ++d) {
    from_float(from[d] / scale, to + d * stride);
  }
  return scale;
}

// Rounded to nearest; to_scalar's double of a float64 row is never rounded on the way.
template <class T>
void as_floats(const Wide<T>* from, int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; ++d) {
    to[d] = static_cast<float>(from[d]);
  }
}

template <class W, class Table>
void turn_pairs(const RotaryTable& r, int64_t position, W* row) {
  const Table* cos = static_cast<const Table*>(r.cos) + position * r.cos_strides[0];
  const Table* sin = static_cast<const Table*>(r.sin) + position * r.sin_strides[0];
  const int64_t step = r.interleaved ? 2 : 1;
  W* second_half = row + (r.interleaved ? 1 : r.pairs);
  for (int64_t i = 0; i < r.pairs; ++i) {
    const W c = static_cast<W>(to_scalar(cos[i * r.cos_strides[1]]));
    const W s = static_cast<W>(to_scalar(sin[i * r.sin_strides[1]]));
    const W first = row[i * step];
    const W second = second_half[i * step];
    row[i * step] = first * c - second * s;
    second_half[i * step] = second * c + first * s;
  }
}

template <class T>
void turn_row(const RotaryTable& r, int64_t position, Wide<T>* row) {
  if (r.dtype == DType::float32) {
    turn_pairs<Wide<T>, float>(r, position, row);
  } else {
    turn_pairs<Wide<T>, T>(r, position, row);
  }
}

// Where a new row goes.
struct Place {
  int64_t outer;  // of the batch, or the page
  int64_t row;
};

Place place_of(const CacheUpdateParams& p, int64_t batch, int64_t position) {
  const int64_t row = position % p.capacity;
  if (p.block_table == nullptr) {
    return {batch, row};
  }
  return {p.block_table[batch * p.block_table_stride + row / p.page_size], row % p.page_size};
}

int64_t offset(const int64_t (&strides)[4], int64_t outer, int64_t head, int64_t row) {
  return outer * strides[0] + head * strides[1] + row * strides[2];
}

template <class Code>
void write_codes(const CacheRows& rows, const float* row, const Place& place, int64_t head) {
  Code* to = static_cast<Code*>(rows.cache) + offset(rows.cache_strides, place.outer, head, place.row);
  rows.scales[place.outer * rows.scale_strides[0] + head * rows.scale_strides[1] + place.row * rows.scale_strides[2]] =
      quantise_row(row, rows.dim, to, rows.cache_strides[3]);
}

template <class T>
void write_row(const CacheUpdateParams& p, const CacheRows& rows, const RotaryTable* rotary, int64_t batch,
               int64_t head, int64_t new_row) {
  const int64_t position = p.start[batch] + new_row;
  const Place place = place_of(p, batch, position);
  const T* from = static_cast<const T*>(rows.rows) + offset(rows.strides, batch, head, new_row);
  if (p.cache_dtype == p.dtype && rotary == nullptr) {
    T* to = static_cast<T*>(rows.cache) + offset(rows.cache_strides, place.outer, head, place.row);
    copy_row(from, rows.strides[3], rows.dim, to, rows.cache_strides[3]);
    return;
  }
  Wide<T> row[kMaxHeadDim] = {};
  load_row(from, rows.strides[3], rows.dim, row);
  if (rotary != nullptr) {
    turn_row<T>(*rotary, position, row);
  }
  if (p.cache_dtype == p.dtype) {
    T* to = static_cast<T*>(rows.cache) + offset(rows.cache_strides, place.outer, head, place.row);
    store_row(row, rows.dim, to, rows.cache_strides[3]);
    return;
  }
  float rounded[kMaxHeadDim];
  as_floats<T>(row, rows.dim, rounded);
  if (p.cache_dtype == DType::int8) {
    write_codes<Int8>(rows, rounded, place, head);
  } else if (p.cache_dtype == DType::float8_e4m3fn) {
    write_codes<Float8E4M3>(rows, rounded, place, head);
  } else {
    write_codes<Float8E5M2>(rows, rounded, place, head);
  }
}

template <class T>
void turn_query(const CacheUpdateParams& p, int64_t batch, int64_t head, int64_t query_row) {
  Wide<T> row[kMaxHeadDim] = {};
  load_row(static_cast<const T*>(p.query) + offset(p.query_strides, batch, head, query_row), p.query_strides[3],
           p.head_dim, row);
  turn_row<T>(p.rotary, p.query_start[batch] + query_row * p.query_step, row);
  store_row(row, p.head_dim, static_cast<T*>(p.turned_query) + offset(p.turned_strides, batch, head, query_row),
            p.turned_strides[3]);
}

// New rows of all sequences in a line, then their queries; tasks are stretches of it.
struct Update {
  const CacheUpdateParams& p;
  int64_t new_rows;  // B * Ln
  int64_t queries;   // B * Lq, or 0
  int64_t per_task;
};

template <class T>
void run_task(void* context, int64_t task, int /*thread*/) {
  const Update& u = *static_cast<const Update*>(context);
  const CacheUpdateParams& p = u.p;
  const int64_t last = u.new_rows + u.queries;
  const int64_t end = (task + 1) * u.per_task < last ? (task + 1) * u.per_task : last;
  const RotaryTable* rotary = p.rotary.cos == nullptr ? nullptr : &p.rotary;
  for (int64_t i = task * u.per_task; i < end; ++i) {
    if (i >= u.new_rows) {
      const int64_t query = i - u.new_rows;
      for (int64_t head = 0; head < p.query_heads; ++head) {
        turn_query<T>(p, query / p.seqlen_q, head, query % p.seqlen_q);
      }
      continue;
    }
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      write_row<T>(p, p.key, rotary, i / p.new_rows, head, i % p.new_rows);
      write_row<T>(p, p.value, nullptr, i / p.new_rows, head, i % p.new_rows);
    }
  }
}

template <class T>
void run(const CacheUpdateParams& p) {
  const int64_t of_keys = p.kv_heads * (p.key.dim + p.value.dim);
  const int64_t of_queries = p.query == nullptr ? 0 : p.query_heads * p.head_dim;
  const int64_t widest = (of_keys > of_queries ? of_keys : of_queries) * static_cast<int64_t>(sizeof(T));
  Update u{p, p.batch * p.new_rows, p.query == nullptr ? 0 : p.batch * p.seqlen_q, 1};
  u.per_task = widest > 0 && widest < kTaskBytes ? kTaskBytes / widest : 1;
  const int64_t rows = u.new_rows + u.queries;
  parallel_for((rows + u.per_task - 1) / u.per_task, p.num_threads, run_task<T>, &u);
}

}  // namespace

void update_caches(const CacheUpdateParams& p) {
  switch (p.dtype) {
    case DType::float32:
      return run<float>(p);
    case DType::float64:
      return run<double>(p);
    case DType::bfloat16:
      return run<Bfloat16>(p);
    default:
      return run<Float16>(p);
  }
}

}  // namespace fastattn
