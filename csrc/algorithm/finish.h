// The end of a panel: sums become output rows, log-sum-exp and, where asked for, the probabilities themselves.
#pragma once

#include <cmath>

#include "algorithm/panel.h"
#include "algorithm/tile_context.h"
#include "algorithm/value_tile.h"

namespace fastattn {
namespace {

// The normaliser of one row: output = sums * inverse; lse is -inf where the row saw nothing and has no sink.
struct Normaliser {
  double inverse;
  double lse;
};

template <class E>
inline Normaliser normaliser(const Panel<E>& panel, const AttentionParams& p, const ScoreRules<E>& rules, int lane,
                             bool want_lse) {
  const double shift = static_cast<double>(panel.shift[lane]) * rules.to_natural() + panel.beyond[lane];
  const auto sum = static_cast<double>(panel.sum[lane]);
  if (p.sinks == nullptr) {
    const double inverse = sum == 0 ? 0 : 1 / sum;
    return {inverse, !want_lse ? 0 : sum == 0 ? -__builtin_inf() : shift + ::log(sum)};
  }
  const double sink = p.sinks[panel.head[lane]];
  if (sum == 0) {
    return {0, sink};
  }
  const double inverse = 1 / (sum + ::exp(sink - shift));
  const double own = shift + ::log(sum);
  const double high = own > sink ? own : sink;
  return {inverse, high + ::log(::exp(own - high) + ::exp(sink - high))};
}

template <class E>
inline void store_row(const typename E::Scalar* row, double inverse, int64_t count, typename E::Source* out,
                      int64_t stride) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  const auto scale = static_cast<Scalar>(inverse);
  if (stride != 1) {
    for (int64_t d = 0; d < count; ++d) {
      from_scalar(row[d] * scale, out + d * stride);
    }
    return;
  }
  const auto factor = V::set1(scale);
  int64_t d = 0;
  for (; d + E::kWidth <= count; d += E::kWidth) {
    V::store(out + d, V::mul(V::load(row + d), factor));
  }
  if (d < count) {
    V::store_partial(out + d, V::mul(V::load(row + d), factor), static_cast<int>(count - d));
  }
}

template <class E>
FASTATTN_INLINE typename E::Source* out_row(const Panel<E>& panel, const AttentionParams& p, int64_t batch, int lane) {
  return static_cast<typename E::Source*>(p.out) + batch * p.out_strides[0] + panel.head[lane] * p.out_strides[1] +
         panel.row[lane] * p.out_strides[2];
}

// Output rows from the sums that a matrix unit left transposed, a square of columns and lanes at a time.
template <class E>
inline void store_transposed(const Panel<E>& panel, const AttentionParams& p, int64_t batch,
                             const Normaliser* normalisers) {
  using V = typename E::V;
  alignas(64) typename E::Scalar piece[E::kWidth];
  for (int lane0 = 0; lane0 < panel.live; lane0 += E::kWidth) {
    for (int64_t d = 0; d < p.value_dim; d += E::kWidth) {
      typename V::Reg r[E::kWidth];
      for (int i = 0; i < E::kWidth; ++i) {
        r[i] = V::load(panel.output + output_index<E>(lane0, d + i, 0));
      }
      V::transpose(r);
      for (int i = 0; i < E::kWidth && lane0 + i < panel.live; ++i) {
        V::store(piece, r[i]);
        store_row<E>(piece, normalisers[lane0 + i].inverse, min64(E::kWidth, p.value_dim - d),
                     out_row<E>(panel, p, batch, lane0 + i) + d * p.out_strides[3], p.out_strides[3]);
      }
    }
  }
}

template <class E>
FASTATTN_NOINLINE void finish_rows(Panel<E>& panel, const AttentionParams& p, const ScoreRules<E>& rules, int64_t batch,
                                   Normaliser* normalisers) {
  for (int lane = 0; lane < panel.live; ++lane) {
    const Normaliser n = normaliser<E>(panel, p, rules, lane, p.lse != nullptr);
    normalisers[lane] = n;
    if constexpr (E::kMethod != Method::tiles) {
      if (p.out != nullptr) {
        store_row<E>(panel.output + lane * rules.output_stride, n.inverse, p.value_dim,
                     out_row<E>(panel, p, batch, lane), p.out_strides[3]);
      }
    }
    if (p.lse != nullptr) {
      const int64_t index =
          batch * p.lse_strides[0] + panel.head[lane] * p.lse_strides[1] + panel.row[lane] * p.lse_strides[2];
      if (p.dtype == DType::float64) {
        static_cast<double*>(p.lse)[index] = n.lse;
      } else {
        static_cast<float*>(p.lse)[index] = static_cast<float>(n.lse);
      }
    }
  }
  if constexpr (E::kMethod == Method::tiles) {
    store_transposed<E>(panel, p, batch, normalisers);
  }
}

// Writes the weights of keys [key, key + count) of the head from a block of probabilities, [strip][step][row][depth].
template <class E>
FASTATTN_NOINLINE void store_weights(const Panel<E>& panel, const AttentionParams& p, int64_t batch,
                                     const typename E::Scalar* probs, const typename E::Scalar* scale, int64_t block,
                                     int64_t begin, int64_t end) {
  using Source = typename E::Source;
  for (int lane = 0; lane < panel.live; ++lane) {
    Source* out = const_cast<Source*>(at<Source>(p.weights, batch * p.weights_strides[0] +
                                                                panel.head[lane] * p.weights_strides[1] +
                                                                panel.row[lane] * p.weights_strides[2]));
    for (int64_t key = begin; key < end; ++key) {
      const double prob = prob_value<E>(probs, lane, key - block);
      from_scalar(prob * scale[lane], out + key * p.weights_strides[3]);
    }
  }
}

}  // namespace
}  // namespace fastattn
