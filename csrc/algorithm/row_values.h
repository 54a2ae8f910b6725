// The second product of Method::rows: probabilities by rows of values.
#pragma once

#include "algorithm/row_dots.h"

namespace fastattn {
namespace {

// output[kRows][kVectors vectors] += sum over keys of probs[row][key] * value[key][column]; `at` is the first column's
// place in a row. kAdjacent: the columns are all there are, and rows lie one behind the other.
template <class E, int kRows, int kVectors, bool kPartial, bool kAdjacent>
FASTATTN_NOINLINE void add_rows(const typename E::Scalar* probs, const char* const* values, int64_t at, int64_t keys,
                                typename E::Scalar* output, int64_t output_stride, int columns, bool fetch) {
  using V = typename E::V;
  using Read = typename E::Read;
  constexpr int64_t kBytes = int64_t{kVectors} * E::kWidth * sizeof(Read);
  constexpr bool kInProduct = kRows > 6 && kVectors > 1;  // broadcasts its probability: registers are full
  constexpr int kTogether = kVectors == 8 || kInProduct ? 2 : kVectors;  // of a row's, that are in registers at once
  typename E::Reg sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = V::zero();
    }
  }
  const char* adjacent = values[0];
  for (int64_t key = 0; key < keys; ++key, adjacent += kBytes) {
    const auto* row = reinterpret_cast<const Read*>(kAdjacent ? adjacent : values[key]) + (kAdjacent ? 0 : at);
    typename E::Reg prob[kRows];
    const auto load_prob = [&](int r) FASTATTN_LAMBDA_INLINE {
      prob[r] = V::set1(probs[r * E::kBlockKeys + key]);
      FASTATTN_KEEP_ORDER();  // nor is it loaded for each product anew
    };
#pragma GCC unroll 8
    for (int r = 0; kVectors == 8 && r < kRows; ++r) {
      load_prob(r);
    }
    if (!kAdjacent && fetch) {
      prefetch_row(values[key + kRowsAhead<E>] + at * static_cast<int64_t>(sizeof(Read)), kBytes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v += kTogether) {
      typename E::Reg x[kTogether];
      FASTATTN_KEEP_ORDER();
      if constexpr (kTogether > 1) {
#pragma GCC unroll 2
        for (int i = 0; i < kTogether; i += 2) {
          V::load_two(row + (v + i) * E::kWidth, x[i], x[i + 1]);
          FASTATTN_KEEP_ORDER();
        }
      } else {
        x[0] = kPartial ? V::load_partial(row, columns) : V::load(row);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        if (kVectors < 8 && !kInProduct) {
          load_prob(r);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
          if constexpr (kInProduct) {
            sum[r][v + i] = V::fma_from(probs[r * E::kBlockKeys + key], x[i], sum[r][v + i]);
          } else {
            sum[r][v + i] = V::fma(prob[r], x[i], sum[r][v + i]);
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v + 1 < kVectors; v += 2) {
      V::template order_two<Read>(sum[r][v], sum[r][v + 1]);
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
template <class E, int kVectors, bool kPartial, bool kAdjacent, int kRows = 1, class... Args>
FASTATTN_INLINE void add_some_rows(int count, Args... args) {
  if (kRows == kSharing<E, kVectors> || count == kRows) {
    add_rows<E, kRows, kVectors, kPartial, kAdjacent>(args...);
  } else if constexpr (kRows < kSharing<E, kVectors>) {
    add_some_rows<E, kVectors, kPartial, kAdjacent, kRows + 1>(count, args...);
  }
}

// Columns [at, at + kVectors vectors) of all rows of the panel.
template <class E, int kVectors, bool kPartial, bool kAdjacent = false>
inline void add_columns(const Panel<E>& panel, const typename E::Scalar* probs, const char* const* values, int64_t at,
                        int64_t keys, int64_t output_stride, int columns) {
  for (int lane = 0; lane < panel.live;) {
    const int count = part_of(panel.live - lane, kSharing<E, kVectors>);
    // Lines of eight vectors follow one another, which the CPU fetches better unasked.
    const bool fetch = lane == 0 && kVectors < 8 && !E::kDecodes;
    add_some_rows<E, kVectors, kPartial, kAdjacent>(count, probs + lane * E::kBlockKeys, values, at, keys,
                                                    panel.output + lane * output_stride + at, output_stride, columns,
                                                    fetch);
    lane += count;
  }
}

// Adds values [begin, end), counted in the block, to the panel's output.
template <class E>
inline void add_value_rows(const Panel<E>& panel, const typename E::Scalar* probs, const char* const* values,
                           int64_t begin, int64_t end, int64_t value_dim, int64_t output_stride, bool adjacent) {
  if constexpr (E::Dot::kPairsValues) {
    E::Dot::template add_values<E>(panel, probs, values, begin, end, value_dim, output_stride, adjacent);
    return;
  }
  constexpr int64_t kColumns = 4 * E::kWidth;
  each_tile(begin, end, rows_at_once<E>(value_dim), [&](int64_t tile, int64_t keys) {
    const auto add = [&](auto columns, int64_t at, int count) {
      columns(panel, probs + tile, values + tile, at, keys, output_stride, count);
    };
    int64_t at = 0;
    const bool fixed =
        lie_adjacent(adjacent, values + tile, keys, value_dim * static_cast<int64_t>(sizeof(typename E::Read)));
    // Where widening is work it is better shared by more rows.
    const bool wide =
        E::kWideRows > 0 && (sizeof(typename E::Read) == sizeof(typename E::Scalar) || panel.live <= E::kWideRows);
    for (; wide && at + 2 * kColumns <= value_dim; at += 2 * kColumns) {
      add(fixed && value_dim == 2 * kColumns ? add_columns<E, 8, false, true> : add_columns<E, 8, false>, at,
          E::kWidth);
    }
    for (; at + kColumns <= value_dim; at += kColumns) {
      add(fixed && value_dim == kColumns ? add_columns<E, 4, false, true> : add_columns<E, 4, false>, at, E::kWidth);
    }
    for (; at < value_dim; at += E::kWidth) {
      const int rest = static_cast<int>(min64(E::kWidth, value_dim - at));
      add(rest == E::kWidth ? add_columns<E, 1, false> : add_columns<E, 1, true>, at, rest);
    }
  });
}

// The same of rows as they are stored.
template <class E>
inline void add_stored_rows(const Panel<E>& panel, const typename E::Scalar* probs, const KeyValueView& view,
                            int64_t begin, int64_t end, int64_t value_dim, int64_t output_stride) {
  if constexpr (E::kDecodes) {
    DecodedRows<E> decoded(view.stored, value_dim);
    each_tile(begin, end, decoded.most(), [&](int64_t key, int64_t count) {
      const char* const* rows = decoded.decode(view.value_rows + key, count);
      add_value_rows<E>(panel, probs + key, rows, 0, count, value_dim, output_stride, true);
    });
  } else {
    add_value_rows<E>(panel, probs, view.value_rows, begin, end, value_dim, output_stride, view.values_adjacent);
  }
}

}  // namespace
}  // namespace fastattn
