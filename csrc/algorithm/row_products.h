// The products of Method::rows: rows of queries dotted with rows of keys, and probabilities by rows of values, each
// row read once from wherever it lies. Rows are found through a table, so pages cost nothing. The order in which memory
// is asked for decides the speed of a product that waits for it: what the CPU itself fetches ahead follows lines that
// come one after another, in a few streams, so rows that are multiplied together stand far apart.
#pragma once

#include "algorithm/operands.h"
#include "algorithm/panel.h"

namespace fastattn {
namespace {

// Rows ahead of the one that is read: as many bytes of small ones.
template <class E>
constexpr int64_t kRowsAhead = sizeof(typename E::Stored) == 1 ? 2 * kPrefetchRows : kPrefetchRows;

// The same in one of several streams of keys, which the CPU follows as well.
template <class E>
constexpr int64_t kStreamRowsAhead = 32 / static_cast<int64_t>(sizeof(typename E::Stored));

// Whether keys are read in streams by so many queries; where arithmetic takes longer, neighbours follow each other.
template <class E>
constexpr bool spreads_keys(int queries) {
  return E::kStreams && (queries == 1 || sizeof(typename E::Stored) == sizeof(typename E::Scalar));
}

// Rows of values that are asked for while scores become probabilities, which reads nothing else: one for each vector.
template <class E>
inline int64_t rows_of_softmax(int live) {
  return min64(int64_t{live} * E::kBlockKeys / E::kWidth, 2 * kRowsAhead<E>);
}

// Where the rows of a key block stand, in the order in which they are read: what is a number of rows ahead is fetched,
// so after the values come the keys of the next block.
template <class E>
struct RowTable {
  const char* keys[E::kBlockKeys];
  const char* values[E::kBlockKeys];
  const char* next[kRowsAhead<E> + E::kKeys];
  // What multiplies rows that are quantised. A value's scale goes into its probability, where one that is not finite
  // stands as 1: such a row is added by itself.
  alignas(64) float key_scales[E::kBlockKeys];
  alignas(64) float value_scales[E::kBlockKeys];
  bool odd_scales;  // some of the values' are not finite
};

// Lists rows [begin, begin + count) of a head; in place of those from `end` on, the last that exists.
inline void list_rows(const AttentionParams& p, const void* base, const int64_t* strides, int64_t size, int64_t batch,
                      int64_t head, int64_t begin, int64_t end, int64_t count, const char** rows) {
  const int64_t stop = min64(begin + count, end);
  const int64_t step = strides[2] * size;
  const char* row = nullptr;
  for (int64_t key = begin; key < stop;) {
    const int64_t run = p.block_table == nullptr ? stop - key : min64(stop - key, p.page_size - key % p.page_size);
    row = static_cast<const char*>(base) + row_index(p, strides, batch, head, key) * size;
    for (int64_t i = 0; i < run; ++i, row += step) {
      *rows++ = row;
    }
    key += run;
  }
  for (int64_t i = stop - begin; i < count; ++i) {
    *rows++ = row - step;
  }
}

// The same where they have been copied next to each other.
inline void list_copied_rows(const char* row, int64_t step, int64_t existing, int64_t count, const char** rows) {
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = row + min64(i, existing - 1) * step;
  }
}

// Lists the scales of the block's existing rows, [begin, end) of a head.
template <class E>
inline void list_scales(const AttentionParams& p, int64_t batch, int64_t head, int64_t begin, int64_t end,
                        RowTable<E>& table) {
  const auto list = [&](const float* scales, const int64_t* strides, float* out) {
    for (int64_t key = begin; key < end;) {
      const int64_t run = p.block_table == nullptr ? end - key : min64(end - key, p.page_size - key % p.page_size);
      const float* from = scales + row_index(p, strides, batch, head, key);
      for (int64_t i = 0; i < run; ++i) {
        out[key - begin + i] = from[i * strides[2]];
      }
      key += run;
    }
  };
  list(p.key_scales, p.key_scale_strides, table.key_scales);
  list(p.value_scales, p.value_scale_strides, table.value_scales);
  table.odd_scales = false;
  for (int64_t i = 0; i < end - begin; ++i) {
    const float scale = table.value_scales[i];
    const bool odd = !(scale - scale == 0);
    table.odd_scales |= odd;
    table.value_scales[i] = odd ? 1 : scale;
  }
  for (int64_t i = end - begin; i < E::kBlockKeys; ++i) {
    table.key_scales[i] = table.value_scales[i] = 1;
  }
}

// raw[query][key] for kQueries rows of queries, `query_stride` lanes apart, and kKeyRows keys, every `step`-th; raw's
// rows are kBlockKeys long. Each sum has lanes of its own, so it does not depend on who is computed beside it. kFetch:
// the rows `ahead` are asked for.
template <class E, int kKeyRows, int kQueries, bool kFetch>
FASTATTN_INLINE void dot_rows(typename E::Scalar* raw, const char* const* keys, int64_t step, int64_t ahead,
                              const typename E::Scalar* query, int64_t head_dim, int64_t query_stride) {
  using V = typename E::V;
  using Dot = typename E::Dot;
  using Stored = typename E::Stored;
  typename E::Reg sum[kQueries * kKeyRows];
#pragma GCC unroll 32
  for (int i = 0; i < kQueries * kKeyRows; ++i) {
    sum[i] = V::zero();
  }
  const Stored* rows[kKeyRows];
#pragma GCC unroll 8
  for (int r = 0; r < kKeyRows; ++r) {
    rows[r] = reinterpret_cast<const Stored*>(keys[r * step]);
  }
  int64_t d = 0;
  const auto multiply = [&](const auto& load) FASTATTN_LAMBDA_INLINE {
    typename E::Reg x[kKeyRows];
#pragma GCC unroll 8
    for (int r = 0; r < kKeyRows; ++r) {
      x[r] = load(rows[r]);
      if constexpr (kQueries == 1) {  // at once: sixteen registers hold no tile of keys beside its sums
        sum[r] = Dot::run(x[r], V::load(query), sum[r]);
      }
      // One line for each that is read: in bursts they wait for each other, and so do the loads behind them.
      if (kFetch && d * int64_t{sizeof(Stored)} % kLine == 0) {
        __builtin_prefetch(keys[r * step + ahead] + d * int64_t{sizeof(Stored)}, 0, 2);
      }
    }
#pragma GCC unroll 8
    for (int q = 0; kQueries > 1 && q < kQueries; ++q) {
      const auto lanes = V::load(query + q * query_stride);
#pragma GCC unroll 8
      for (int r = 0; r < kKeyRows; ++r) {
        sum[q * kKeyRows + r] = Dot::run(x[r], lanes, sum[q * kKeyRows + r]);
      }
    }
  };
  for (; d + Dot::kElements <= head_dim; d += Dot::kElements, query += E::kWidth) {
    multiply([&](const Stored* row) FASTATTN_LAMBDA_INLINE { return Dot::load(row + d); });
  }
  if (d < head_dim) {
    const int rest = static_cast<int>(head_dim - d);
    multiply([&](const Stored* row) FASTATTN_LAMBDA_INLINE { return Dot::load_partial(row + d, rest); });
  }
  constexpr int kTogether = kQueries * kKeyRows <= 8 ? 8 : V::kSums;
  constexpr int kPer = kTogether / kKeyRows;  // queries whose sums are totalled together
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; q += kPer) {
    typename E::Reg some[kTogether];
#pragma GCC unroll 16
    for (int i = 0; i < kTogether; ++i) {
      some[i] = q * kKeyRows + i < kQueries * kKeyRows ? Dot::total(sum[q * kKeyRows + i]) : V::zero();
    }
    alignas(64) typename E::Scalar totals[kTogether];
    V::sum_lanes(some, totals);
    for (int i = 0; i < kPer && q + i < kQueries; ++i) {
      for (int r = 0; r < kKeyRows; ++r) {
        raw[(q + i) * E::kBlockKeys + r * step] = totals[i * kKeyRows + r];
      }
    }
  }
}

// Scores of kQueries rows by one of `tiles` tiles of kKeys keys.
template <class E, int kQueries, bool kFetch>
FASTATTN_NOINLINE void dot_tile(typename E::Scalar* raw, const char* const* keys, int64_t tile, int64_t tiles,
                                const typename E::Scalar* query, int64_t head_dim, int64_t query_stride) {
  // One query has sums enough with eight keys; more share four, which they find in registers.
  constexpr int kKeyRows = kQueries == 1 ? 8 : 4;
  constexpr int kParts = E::kKeys / kKeyRows;
  constexpr bool kStreams = spreads_keys<E>(kQueries);
  const int64_t step = kStreams ? kParts * tiles : 1;
  constexpr int64_t kAhead = kStreams ? kStreamRowsAhead<E> : kRowsAhead<E>;
  for (int part = 0; part < kParts; ++part) {
    const int64_t key = kStreams ? tile * kParts + part : tile * E::kKeys + part * kKeyRows;
    dot_rows<E, kKeyRows, kQueries, kFetch>(raw + key, keys + key, step, kAhead, query, head_dim, query_stride);
  }
}

// Splits `rows` into as few parts of at most `most` as there can be, sizes that differ by one.
inline int part_of(int rows, int most) {
  const int parts = (rows + most - 1) / most;
  return (rows + parts - 1) / parts;
}

// dot_tile for `count` queries, one of kQueries and more.
template <class E, bool kFetch, int kQueries = 1>
inline void dot_queries(int count, typename E::Scalar* raw, const char* const* keys, int64_t tile, int64_t tiles,
                        const typename E::Scalar* query, int64_t head_dim, int64_t query_stride) {
  if (kQueries == E::kQueryRows || count == kQueries) {
    dot_tile<E, kQueries, kFetch>(raw, keys, tile, tiles, query, head_dim, query_stride);
  } else if constexpr (kQueries < E::kQueryRows) {
    dot_queries<E, kFetch, kQueries + 1>(count, raw, keys, tile, tiles, query, head_dim, query_stride);
  }
}

// raw[lane][key ...] for all rows of the panel and keys of `tiles` tiles.
template <class E>
inline void multiply_rows(typename E::Scalar* raw, const Panel<E>& panel, const char* const* keys, int64_t tiles,
                          int64_t head_dim) {
  static_assert(E::kKeys == 8);
  const int64_t stride = query_lanes<E>(head_dim);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int lane = 0; lane < panel.live;) {
      const int count = part_of(panel.live - lane, E::kQueryRows);
      const auto dot = lane == 0 ? dot_queries<E, true> : dot_queries<E, false>;
      dot(count, raw + lane * E::kBlockKeys, keys, tile, tiles, panel.query + lane * stride, head_dim, stride);
      lane += count;
    }
  }
}

// output[kRows][kVectors vectors] += sum over keys of probs[row][key] * value[key][column]; `at` is the first column's
// place in a row.
template <class E, int kRows, int kVectors, bool kPartial>
FASTATTN_NOINLINE void add_rows(const typename E::Scalar* probs, const char* const* values, int64_t at, int64_t keys,
                                typename E::Scalar* output, int64_t output_stride, int columns, bool fetch) {
  using V = typename E::V;
  using Stored = typename E::Stored;
  constexpr int64_t kBytes = int64_t{kVectors} * E::kWidth * sizeof(Stored);
  constexpr int kTogether = kVectors == 8 ? 2 : kVectors;  // vectors of a row that are in registers at once
  typename E::Reg sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = V::zero();
    }
  }
  for (int64_t key = 0; key < keys; ++key) {
    const auto* row = reinterpret_cast<const Stored*>(values[key]) + at;
    if (fetch) {
      prefetch_row(values[key + kRowsAhead<E>] + at * static_cast<int64_t>(sizeof(Stored)), kBytes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v += kTogether) {
      typename E::Reg x[kTogether];
      if constexpr (kTogether > 1) {
#pragma GCC unroll 2
        for (int i = 0; i < kTogether; i += 2) {
          V::load_two(row + (v + i) * E::kWidth, x[i], x[i + 1]);
        }
      } else {
        x[0] = kPartial ? V::load_partial(row, columns) : V::load(row);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const auto prob = V::set1(probs[r * E::kBlockKeys + key]);
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
          sum[r][v + i] = V::fma(prob, x[i], sum[r][v + i]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v + 1 < kVectors; v += 2) {
      V::template order_two<Stored>(sum[r][v], sum[r][v + 1]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      typename E::Scalar* to = output + r * output_stride + v * E::kWidth;
      V::store(to, V::add(V::load(to), sum[r][v]));
    }
  }
}

// Rows of probabilities that share a value once it is read: with eight vectors of it, as many as there are registers.
template <class E, int kVectors>
constexpr int kSharing = kVectors == 8 ? E::kWideRows : E::kValueRows;

// add_rows for `count` rows, one of kRows and more.
template <class E, int kVectors, bool kPartial, int kRows = 1, class... Args>
FASTATTN_INLINE void add_some_rows(int count, Args... args) {
  if (kRows == kSharing<E, kVectors> || count == kRows) {
    add_rows<E, kRows, kVectors, kPartial>(args...);
  } else if constexpr (kRows < kSharing<E, kVectors>) {
    add_some_rows<E, kVectors, kPartial, kRows + 1>(count, args...);
  }
}

// Columns [at, at + kVectors vectors) of all rows of the panel.
template <class E, int kVectors, bool kPartial>
inline void add_columns(const Panel<E>& panel, const typename E::Scalar* probs, const char* const* values, int64_t at,
                        int64_t keys, int64_t output_stride, int columns) {
  for (int lane = 0; lane < panel.live;) {
    const int count = part_of(panel.live - lane, kSharing<E, kVectors>);
    // Lines of eight vectors follow one another, which the CPU fetches better unasked.
    const bool fetch = lane == 0 && kVectors < 8;
    add_some_rows<E, kVectors, kPartial>(count, probs + lane * E::kBlockKeys, values, at, keys,
                                         panel.output + lane * output_stride + at, output_stride, columns, fetch);
    lane += count;
  }
}

// Adds values [begin, end), counted in the block, to the panel's output.
template <class E>
inline void add_value_rows(const Panel<E>& panel, const typename E::Scalar* probs, const char* const* values,
                           int64_t begin, int64_t end, int64_t value_dim, int64_t output_stride) {
  if constexpr (E::Dot::kPairsValues) {
    E::Dot::template add_values<E>(panel, probs, values, begin, end, value_dim, output_stride);
    return;
  }
  constexpr int64_t kColumns = 4 * E::kWidth;
  probs += begin;
  values += begin;
  int64_t at = 0;
  if constexpr (E::kWideRows > 0) {
    // Where widening is work it is better shared by more rows.
    const bool wide = sizeof(typename E::Stored) == sizeof(typename E::Scalar) || panel.live <= E::kWideRows;
    for (; wide && at + 2 * kColumns <= value_dim; at += 2 * kColumns) {
      add_columns<E, 8, false>(panel, probs, values, at, end - begin, output_stride, E::kWidth);
    }
  }
  for (; at + kColumns <= value_dim; at += kColumns) {
    add_columns<E, 4, false>(panel, probs, values, at, end - begin, output_stride, E::kWidth);
  }
  for (; at < value_dim; at += E::kWidth) {
    const int rest = static_cast<int>(min64(E::kWidth, value_dim - at));
    (rest == E::kWidth ? add_columns<E, 1, false> : add_columns<E, 1, true>)(panel, probs, values, at, end - begin,
                                                                             output_stride, rest);
  }
}

}  // namespace
}  // namespace fastattn
