// One tile of the backward: probabilities P and score gradients dS of kKeys keys by kLanes queries, and the products
// that take them to dQ, dK and dV.
#pragma once

#include "algorithm/score_tile.h"

namespace fastattn {
namespace {

// Where a tile of the backward finds its operands. P and dS of one tile are [kKeys][kLanes].
template <class E>
struct GradientContext {
  using Scalar = typename E::Scalar;
  TileContext<E> scores;     // panel, rules and dense arguments of the score tile
  const Scalar* grad_out;    // the panel's rows of dO as operands: [padded Dv / depth][kLanes]
  int64_t value_steps;       // lanes of operands a row of V has
  const Scalar* level;       // lse of each lane, in the unit of the scores; +inf in lanes without a row
  const Scalar* excess;      // of each lane: log2 of what P under that level adds up to, where it is not 1
  const Scalar* delta;       // of each lane: <dO, O> - dlse
  const Scalar* kept;        // null, or what dropout multiplies P by, [kKeys][kLanes] of this tile
  const Scalar* probs_grad;  // null, or what is added to dP, [kKeys][kLanes] of this tile
  double* slope_grad;        // null, or sums of -dS * distance of each lane
  int64_t block_key;         // of the tile
};

// Where a tile leaves P and dS as coefficients of the second products. Lanes that pair two numbers pair two queries for
// dV and dK, which sum over queries, and two keys for dQ; else one copy of dS serves both.
template <class E>
struct Coefficients {
  using Scalar = typename E::Scalar;
  Scalar* probs;        // [kKeys][kLanes / depth]
  Scalar* grads;        // the same
  Scalar* query_grads;  // [kKeys / depth][kLanes]; `grads` where depth is 1
};

// Lanes of coefficients of one key, and of one tile.
template <class E>
constexpr int kKeyLanes = E::kLanes / E::kDepth;
template <class E>
constexpr int64_t kTileCoefficients = int64_t{E::kKeys} * kKeyLanes<E>;

// P of one tile. `raw`, if not null, keeps the products (softcap's derivative needs them).
template <class E, TileKind kind, int kActive>
FASTATTN_NOINLINE void probability_tile(GradientContext<E>& context, TileRows key, typename E::Scalar* probs,
                                        typename E::Scalar* raw) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  TileContext<E>& tile = context.scores;
  Scores<E, kActive> s;
  multiply_keys<E, kActive>(s, key.rows, key.stride, tile.panel.query, tile.rules.steps);
  if constexpr (!E::kFused) {  // few registers: the softmax reads from memory
    store_scores<E, kActive>(probs, s);
    load_scores<E, kActive>(probs, s);
  }
  if constexpr (adjusts(kind)) {
    if (raw != nullptr) {
      store_scores<E, kActive>(raw, s);
    }
  }
  finish_scores<E, kind, kActive>(tile, s, context.block_key, nullptr);
#pragma GCC unroll 4
  for (int v = 0; v < kActive; ++v) {
    const auto level = V::load(context.level + v * E::kWidth);
    const auto excess = V::load(context.excess + v * E::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < E::kKeys; ++r) {
      typename E::Reg x;
      if constexpr (adjusts(kind)) {
        x = V::fms(V::sub(s[r][v], level), V::set1(static_cast<Scalar>(kLog2E)), excess);
      } else if constexpr (E::Product::kScaleQuery) {
        x = V::sub(s[r][v], level);
      } else {
        x = V::fms(s[r][v], V::set1(tile.rules.factor), level);
      }
      auto prob = E::Product::power(x);
      if constexpr (hides(kind)) {  // 0 where it is hidden, also under a normaliser that is NaN
        const auto lowest = V::set1(-static_cast<Scalar>(__builtin_inf()));
        prob = V::select(V::less_equal(s[r][v], lowest), V::zero(), prob);
      }
      V::store(probs + r * E::kLanes + v * E::kWidth, prob);
    }
  }
}

// Rounds what kActive vectors of lanes hold of P and dS to coefficients, and stores them where two numbers make a lane.
template <class E, int kActive>
FASTATTN_INLINE void store_coefficients(const Scores<E, kActive>& rows, typename E::Scalar* out) {
  if constexpr (E::kDepth == 2) {
    using V = typename E::V;
#pragma GCC unroll 8
    for (int r = 0; r < E::kKeys; ++r) {
      V::store(out + r * (E::kLanes / 2), E::Product::pair_lanes(rows[r][0], kActive == 2 ? rows[r][1] : V::zero()));
    }
  }
}

template <class E, int kActive>
FASTATTN_INLINE void store_key_pairs(const Scores<E, kActive>& rows, typename E::Scalar* out) {
  if constexpr (E::kDepth == 2) {
    using V = typename E::V;
#pragma GCC unroll 4
    for (int v = 0; v < kActive; ++v) {
#pragma GCC unroll 8
      for (int r = 0; r < E::kKeys; r += 2) {
        const typename E::Reg keys[2] = {rows[r][v], rows[r + 1][v]};
        typename E::Reg pair[1];
        E::Product::pack_probs(keys, pair);
        V::store(out + r / 2 * E::kLanes + v * E::kWidth, pair[0]);
      }
    }
  }
}

// dS = P (dP - delta) of one tile, dP = V dO^T. kHides: a pair that is hidden has P = 0 and gets 0, whatever dP is; and
// there may be dropout. `coefficients`, if not null, gets P and dS as pairs; else dS goes to `grads`, as does that
// where depth is 1.
template <class E, bool kHides, int kActive>
FASTATTN_NOINLINE void gradient_tile(const GradientContext<E>& context, TileRows value, const typename E::Scalar* probs,
                                     typename E::Scalar* grads, const Coefficients<E>* coefficients) {
  using V = typename E::V;
  Scores<E, kActive> s;
  multiply_keys<E, kActive>(s, value.rows, value.stride, context.grad_out, context.value_steps);
  if constexpr (!E::kFused) {
    store_scores<E, kActive>(grads, s);
    load_scores<E, kActive>(grads, s);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kActive; ++v) {
    const auto delta = V::load(context.delta + v * E::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < E::kKeys; ++r) {
      const int64_t at = r * E::kLanes + v * E::kWidth;
      const auto prob = V::load(probs + at);
      auto grad = s[r][v];
      if (kHides && context.kept != nullptr) {
        grad = V::mul(grad, V::load(context.kept + at));
      }
      auto x = V::mul(prob, V::sub(grad, delta));
      if constexpr (kHides) {
        x = V::select(V::less_equal(prob, V::zero()), V::zero(), x);
      }
      s[r][v] = x;
    }
  }
  if (E::kDepth == 1 || coefficients == nullptr) {
    store_scores<E, kActive>(grads, s);
    return;
  }
  store_coefficients<E, kActive>(s, coefficients->grads);
  store_key_pairs<E, kActive>(s, coefficients->query_grads);
  load_scores<E, kActive>(probs, s);
  store_coefficients<E, kActive>(s, coefficients->probs);
}

// P and dS of one tile, from memory to pairs.
template <class E, int kActive>
FASTATTN_NOINLINE void pack_coefficients(const typename E::Scalar* probs, const typename E::Scalar* grads,
                                         const Coefficients<E>& coefficients) {
  Scores<E, kActive> s;
  load_scores<E, kActive>(probs, s);
  store_coefficients<E, kActive>(s, coefficients.probs);
  load_scores<E, kActive>(grads, s);
  store_coefficients<E, kActive>(s, coefficients.grads);
  store_key_pairs<E, kActive>(s, coefficients.query_grads);
}

// What one key of the tile gives to the slopes of a vector of lanes. Scores hold the distance up to the key nearest to
// the position; the way from there counts as far as dS does not add up to 0, as where keys are a part of all.
template <class E>
FASTATTN_NOINLINE void add_slope_grads(const GradientContext<E>& context, int first_lane, int64_t block_key,
                                       typename E::Reg grad) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  const Panel<E>& panel = context.scores.panel;
  const auto key = V::set1(static_cast<Scalar>(block_key));
  alignas(64) Scalar grads[E::kWidth];
  alignas(64) Scalar near[E::kWidth];
  V::store(grads, grad);
  V::store(near, V::mul(grad, V::abs(V::sub(V::load(panel.block_position + first_lane), key))));
  for (int i = 0; i < E::kWidth; ++i) {
    context.slope_grad[first_lane + i] -=
        static_cast<double>(near[i]) + static_cast<double>(grads[i]) * panel.overshoot(first_lane + i);
  }
}

// What the fast tile leaves out: gradients of the weights that come in, of ALiBi's slopes, and through softcap. `grads`
// holds dS without these and gets it with them; `probs` gets P as dropout leaves it, for dV. `raw` is null where
// softcap's derivative is to be left out.
template <class E>
FASTATTN_NOINLINE void gradient_extras(const GradientContext<E>& context, typename E::Scalar* probs,
                                       const typename E::Scalar* raw, typename E::Scalar* grads) {
  using V = typename E::V;
  const Panel<E>& panel = context.scores.panel;
  const ScoreRules<E>& rules = context.scores.rules;
  const auto cap = V::set1(rules.softcap);
  const auto inverse = V::set1(rules.softcap > 0 ? 1 / rules.softcap : 0);
  for (int r = 0; r < E::kKeys; ++r) {
    for (int v = 0; v * E::kWidth < panel.live; ++v) {
      const int64_t at = r * E::kLanes + v * E::kWidth;
      const auto prob = V::load(probs + at);
      const auto hidden = V::less_equal(prob, V::zero());
      auto x = V::load(grads + at);
      if (context.probs_grad != nullptr) {
        auto grad = V::load(context.probs_grad + at);
        if (context.kept != nullptr) {
          grad = V::mul(grad, V::load(context.kept + at));
        }
        x = V::add(x, V::select(hidden, V::zero(), V::mul(prob, grad)));
      }
      if (context.slope_grad != nullptr) {
        add_slope_grads<E>(context, v * E::kWidth, context.block_key + r, x);
      }
      if (rules.softcap > 0 && raw != nullptr) {
        const auto ratio = V::mul(softcap<V>(scale_score<E>(rules, V::load(raw + at)), cap, inverse), inverse);
        const auto slope = V::sub(V::set1(1), V::mul(ratio, ratio));
        x = V::select(hidden, V::zero(), V::mul(x, slope));
      }
      V::store(grads + at, x);
      if (context.kept != nullptr) {
        V::store(probs + at, V::mul(prob, V::load(context.kept + at)));
      }
    }
  }
}

// Rows of a tensor as the second products read them: whole vectors side by side.
struct RowBase {
  const char* rows;
  int64_t stride;  // bytes
};

// Steps of a product: runs of so many each, but for the first, which starts at step `from`, and the last, which ends
// before step `to`. A run's coefficients start `stride` after those of the one before it.
struct StepRuns {
  int64_t count;
  int64_t stride;
  int64_t steps;
  int64_t from;
  int64_t to;
};

// out[kRowCount][kVectors vectors] += sum over runs and their steps of coefficient[row][step] * rows[step]. Steps count
// on through the rows from run to run.
template <class E, int kRowCount, int kRowStride, int kStepStride, int kVectors>
FASTATTN_NOINLINE void product_tile(const typename E::Scalar* coefficients, StepRuns runs, RowBase base,
                                    typename E::Scalar* out, int64_t out_stride) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  typename E::Reg sum[kRowCount][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = V::zero();
    }
  }
  const char* row = base.rows + runs.from * base.stride;
  int64_t from = runs.from;
  for (int64_t run = 1; run <= runs.count; ++run, coefficients += runs.stride) {
    const Scalar* at = coefficients + from * kStepStride;
    int64_t left = (run < runs.count ? runs.steps : runs.to) - from;
    from = 0;
#pragma GCC unroll 2
    for (; left > 0; --left) {
      typename E::Reg x[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        x[v] = V::load(reinterpret_cast<const Scalar*>(row) + v * E::kWidth);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRowCount; ++r) {
        const auto coefficient = V::set1(at[r * kRowStride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = E::Product::run(coefficient, x[v], sum[r][v]);
        }
      }
      at += kStepStride;
      row += base.stride;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Scalar* to = out + r * out_stride + v * E::kWidth;
      V::store(to, V::add(V::load(to), sum[r][v]));
    }
  }
}

template <class E>
using ProductTileFn = void (*)(const typename E::Scalar* coefficients, StepRuns runs, RowBase base,
                               typename E::Scalar* out, int64_t out_stride);

// Calls run(tile, base, d) for each stretch of `columns`, a multiple of the vector: the rows of a stretch are few
// enough to stay in the first-level cache while all tiles that read them are made.
template <class E, int kRowCount, int kRowStride, int kStepStride, class Run>
FASTATTN_INLINE void for_columns(RowBase base, int64_t columns, Run run) {
  for (int64_t d = 0; d < columns; d += 2 * E::kWidth) {
    const ProductTileFn<E> tile = columns - d > E::kWidth ? product_tile<E, kRowCount, kRowStride, kStepStride, 2>
                                                          : product_tile<E, kRowCount, kRowStride, kStepStride, 1>;
    run(tile, RowBase{base.rows + d * static_cast<int64_t>(sizeof(typename E::Scalar)), base.stride}, d);
  }
}

}  // namespace
}  // namespace fastattn
