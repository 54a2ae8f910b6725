// The second product: probabilities of one key block by its values, added to the output rows.
#pragma once

#include "algorithm/operands.h"
#include "algorithm/panel.h"

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

// Keys [begin, end) of the block at `view.start`, all columns, all strips that hold a live row.
template <class E>
inline void accumulate_values(Panel<E>& panel, const typename E::Scalar* probs, const KeyValueView& view, int64_t begin,
                              int64_t end, int64_t value_dim, int64_t output_stride, bool padded) {
  constexpr int64_t kStripStride = int64_t{E::kBlockKeys} / E::kDepth * E::kRows;
  constexpr int kTileColumns = 2 * E::kWidth;
  const int64_t first_step = begin / E::kDepth;
  const int64_t steps = (end - begin + E::kDepth - 1) / E::kDepth;
  const char* value = view.value + first_step * view.value_stride;
  const int strips = (panel.live + E::kRows - 1) / E::kRows;
  for (int64_t d = 0; d < value_dim; d += kTileColumns) {
    const char* column = value + d * static_cast<int64_t>(sizeof(typename E::Scalar));
    const int64_t rest = value_dim - d;
    const int tail = static_cast<int>(rest % E::kWidth);
    const bool partial = !padded && tail != 0 && rest < kTileColumns;
    auto* tile = rest > E::kWidth ? (partial ? value_tile<E, 2, true> : value_tile<E, 2, false>)
                                  : (partial ? value_tile<E, 1, true> : value_tile<E, 1, false>);
    for (int strip = 0; strip < strips; ++strip) {
      tile(probs + strip * kStripStride + first_step * E::kRows, column, view.value_stride, steps,
           panel.output + strip * E::kRows * output_stride + d, output_stride, tail);
    }
  }
}

// Whether a value in keys [begin, end) is Inf or NaN: then a probability of 0 does not silence it.
template <class E>
FASTATTN_NOINLINE bool has_nonfinite_value(const KeyValueView& view, int64_t begin, int64_t end, int64_t value_dim) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  auto sum = V::zero();
  const auto zero = V::zero();
  for (int64_t step = begin / E::kDepth; step < (end + E::kDepth - 1) / E::kDepth; ++step) {
    const auto* row = reinterpret_cast<const Scalar*>(view.value + step * view.value_stride);
    for (int64_t d = 0; d < value_dim; d += E::kWidth) {
      const int count = static_cast<int>(min64(E::kWidth, value_dim - d));
      const auto x = count == E::kWidth ? V::load(row + d) : V::load_partial(row + d, count);
      sum = E::Product::poison(x, zero, sum);
    }
  }
  return V::any(V::unordered(sum));
}

// The slow way for keys whose values are not finite: each such key is added to exactly the rows that see it.
// `clean` is room for a copy of the block's values without these keys. `sees(lane, key)`: keys relative to the block.
template <class E, class Sees>
FASTATTN_NOINLINE void accumulate_guarded(Panel<E>& panel, typename E::Scalar* probs, const KeyValueView& view,
                                          int64_t begin, int64_t end, int64_t value_dim, int64_t output_stride,
                                          bool padded, char* clean, Sees sees) {
  using Element = typename E::Element;
  using Scalar = typename E::Scalar;
  constexpr int64_t kStripStride = int64_t{E::kBlockKeys} / E::kDepth * E::kRows;
  const int64_t row_bytes = output_stride * static_cast<int64_t>(sizeof(Scalar));
  const auto cell = [&](const char* base, int64_t stride, int64_t key, int64_t d) FASTATTN_LAMBDA_INLINE {
    return reinterpret_cast<const Element*>(base + key / E::kDepth * stride) + d * E::kDepth + key % E::kDepth;
  };
  KeyValueView cleaned = view;
  cleaned.value = clean;
  cleaned.value_stride = row_bytes;
  const int64_t stop = round_up(end, E::kDepth);
  const int64_t padded_columns = padded ? output_stride : value_dim;
  bool bad[E::kBlockKeys] = {};
  for (int64_t key = begin; key < stop; ++key) {
    for (int64_t d = 0; d < padded_columns; ++d) {
      const auto x = static_cast<double>(to_scalar(*cell(view.value, view.value_stride, key, d)));
      bad[key] |= !(x - x == 0);
    }
    for (int64_t d = 0; d < output_stride; ++d) {
      const bool keep = !bad[key] && d < padded_columns;
      *const_cast<Element*>(cell(clean, row_bytes, key, d)) =
          keep ? *cell(view.value, view.value_stride, key, d) : Element{};
    }
  }
  accumulate_values<E>(panel, probs, cleaned, begin, end, value_dim, output_stride, true);
  for (int64_t key = begin; key < end; ++key) {
    for (int lane = 0; bad[key] && lane < panel.live; ++lane) {
      if (!sees(lane, key)) {
        continue;
      }
      const auto* strip = reinterpret_cast<const Element*>(probs + lane / E::kRows * kStripStride);
      const Element prob = strip[(key / E::kDepth * E::kRows + lane % E::kRows) * E::kDepth + key % E::kDepth];
      for (int64_t d = 0; d < value_dim; ++d) {
        const auto x = to_scalar(*cell(view.value, view.value_stride, key, d));
        panel.output[lane * output_stride + d] += static_cast<Scalar>(to_scalar(prob) * x);
      }
    }
  }
}

}  // namespace
}  // namespace fastattn
