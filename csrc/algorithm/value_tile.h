// The second product: probabilities of one key block by its values, added to the output rows.
#pragma once

#include "algorithm/key_product.h"
#include "algorithm/row_values.h"

namespace fastattn {
namespace {

// output[kRows][kVectors vectors] += sum over steps of probs[step][row] * value[step][column]. The block's sum starts
// from zero and is added once, which keeps the error of long sums down. `columns` are valid in the last vector.
template <class E, int kVectors, bool kPartial>
FASTATTN_NOINLINE void value_tile(const typename E::Scalar* probs, const char* value, int64_t value_stride,
                                  int64_t steps, typename E::Scalar* output, int64_t output_stride, int columns) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  typename E::Reg sum[E::kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < E::kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = V::zero();
    }
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < steps; ++k) {
    const auto* row = reinterpret_cast<const Scalar*>(value + k * value_stride);
    typename E::Reg x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      x[v] =
          kPartial && v == kVectors - 1 ? V::load_partial(row + v * E::kWidth, columns) : V::load(row + v * E::kWidth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < E::kRows; ++r) {
      const auto prob = V::set1(probs[k * E::kRows + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = E::Product::run(prob, x[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < E::kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Scalar* to = output + r * output_stride + v * E::kWidth;
      V::store(to, V::add(V::load(to), sum[r][v]));
    }
  }
}

// The keys of [begin, end), counted in the block, that some row of the strip from `lane` on sees.
template <class E>
inline Interval strip_keys(const Panel<E>& panel, int lane, int64_t block, int64_t begin, int64_t end) {
  if (panel.first_max <= block + begin && panel.last_min >= block + end) {
    return {begin, end};
  }
  int64_t first = INT64_MAX;
  int64_t last = 0;
  for (int i = lane; i < lane + E::kRows; ++i) {
    first = min64(first, panel.first[i]);
    last = max64(last, panel.last[i]);
  }
  return {max64(begin, round_down(first - block, E::kKeys)), min64(end, last - block)};
}

// Method::broadcast: all columns, all strips that hold a live row.
template <class E>
inline void accumulate_strips(Panel<E>& panel, const typename E::Scalar* probs, const KeyValueView& view, int64_t begin,
                              int64_t end, int64_t value_dim, int64_t output_stride, bool padded) {
  constexpr int kTileColumns = 2 * E::kWidth;
  Interval keys[E::kLanes / E::kRows];
  for (int lane = 0; lane < panel.live; lane += E::kRows) {
    keys[lane / E::kRows] = strip_keys<E>(panel, lane, view.start, begin, end);
  }
  for (int64_t d = 0; d < value_dim; d += kTileColumns) {
    const char* column = view.value + d * static_cast<int64_t>(sizeof(typename E::Scalar));
    const int64_t rest = value_dim - d;
    const int tail = static_cast<int>(rest % E::kWidth);
    const bool partial = !padded && tail != 0 && rest < kTileColumns;
    auto* tile = rest > E::kWidth ? (partial ? value_tile<E, 2, true> : value_tile<E, 2, false>)
                                  : (partial ? value_tile<E, 1, true> : value_tile<E, 1, false>);
    for (int lane = 0; lane < panel.live; lane += E::kRows) {
      const Interval seen = keys[lane / E::kRows];
      const int64_t steps = (seen.last - seen.first + E::kDepth - 1) / E::kDepth;
      if (steps > 0) {
        tile(probs + prob_index<E>(lane, seen.first) / E::kDepth, column + seen.first / E::kDepth * view.value_stride,
             view.value_stride, steps, panel.output + lane * output_stride + d, output_stride, tail);
      }
    }
  }
}

// Adds keys [begin, end) of the block at `view.start` to the panel's output.
template <class E>
inline void accumulate_values(Panel<E>& panel, const typename E::Scalar* probs, const KeyValueView& view, int64_t begin,
                              int64_t end, int64_t value_dim, int64_t output_stride, bool padded) {
  if constexpr (E::kMethod == Method::tiles) {
    E::accumulate_tiles(panel.output, probs, view.value, begin, end, output_stride, panel.live);
  } else if constexpr (E::kMethod == Method::rows) {
    add_stored_rows<E>(panel, probs, view, begin, end, value_dim, output_stride);
  } else {
    accumulate_strips<E>(panel, probs, view, begin, end, value_dim, output_stride, padded);
  }
}

// Whether the scale of a row of values, counted in the head, stands alone.
template <class E>
inline bool scaled_alone(const AttentionParams& p, const StoredRows& values, int64_t batch, int64_t head, int64_t key) {
  return E::kMethod == Method::rows && is_quantised(p) && stands_alone(row_scale(p, values, batch, head, key));
}

// Marks the keys of [begin, end), counted in the head, whose values are not all finite, which a probability of 0 does
// not silence, or whose scales stand alone. Returns whether there are any.
template <class E>
FASTATTN_NOINLINE bool find_nonfinite(const AttentionParams& p, int64_t batch, int64_t head, int64_t begin, int64_t end,
                                      bool* bad) {
  using V = typename E::V;
  bool found = false;
  const StoredRows values = StoredRows::values(p);
  typename E::Source buffer[kMaxHeadDim];  // of keys too, for the backward
  for (int64_t key = begin; key < end; ++key) {
    const auto* row = read_row<E>(p, values, batch, head, key, buffer);
    auto sum = V::zero();
    for (int64_t d = 0; d < p.value_dim; d += E::kWidth) {
      const int count = static_cast<int>(min64(E::kWidth, p.value_dim - d));
      sum = V::fma(count == E::kWidth ? V::load(row + d) : V::load_partial(row + d, count), V::zero(), sum);
    }
    bad[key - begin] = V::any(V::unordered(sum)) || scaled_alone<E>(p, values, batch, head, key);
    found |= bad[key - begin];
  }
  return found;
}

// The slow way, for a block with such keys: each of them is added to exactly the rows that see it. `bad` and `sees`
// count keys within the block, `clean` is room for the block's packed values without them.
template <class E, class Sees>
FASTATTN_NOINLINE void accumulate_guarded(Panel<E>& panel, typename E::Scalar* probs, const AttentionParams& p,
                                          const OperandLayout& layout, int64_t batch, int64_t head, int64_t block,
                                          int64_t begin, int64_t end, int64_t output_stride, const bool* bad,
                                          char* clean, Sees sees) {
  using Scalar = typename E::Scalar;
  KeyValueView cleaned{};
  cleaned.start = block;
  cleaned.value = clean;
  cleaned.value_stride = layout.value_row_bytes;
  pack_values<E>(p, batch, head, block, block + end, layout.value_row_bytes, bad, clean);
  const char* rows[E::kMethod == Method::rows ? E::kBlockKeys + 3 * kRowsAhead<E> : 1];
  if constexpr (E::kMethod == Method::rows) {
    list_copied_rows(clean, layout.value_row_bytes, end, E::kBlockKeys + 3 * kRowsAhead<E>, rows);
    cleaned.value_rows = rows;
    cleaned.stored = p.kv_dtype;
  }
  accumulate_values<E>(panel, probs, cleaned, begin, end, p.value_dim, output_stride, true);
  const StoredRows values = StoredRows::values(p);
  typename E::Source buffer[kMaxValueDim];
  for (int64_t key = begin; key < end; ++key) {
    for (int lane = 0; bad[key] && lane < panel.live; ++lane) {
      if (!sees(lane, key)) {
        continue;
      }
      const double prob = prob_value<E>(probs, lane, key);
      // Other probabilities have it already.
      const bool scaled = E::kMethod != Method::rows || scaled_alone<E>(p, values, batch, head, block + key);
      const auto* row = read_row<E>(p, values, batch, head, block + key, buffer, scaled);
      for (int64_t d = 0; d < p.value_dim; ++d) {
        panel.output[output_index<E>(lane, d, output_stride)] += static_cast<Scalar>(prob * to_scalar(row[d]));
      }
    }
  }
}

}  // namespace
}  // namespace fastattn
