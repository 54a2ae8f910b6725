// The first product and the softmax: scores of kKeys keys by kLanes queries, turned into probabilities where they are.
#pragma once

#include "algorithm/panel.h"

namespace fastattn {
namespace {

// What a tile needs besides scores.
enum class TileKind {
  plain,    // every lane sees every key, nothing is added
  masked,   // some lanes do not see some keys
  general,  // bias, ALiBi, softcap, and masks
};

// Terms of the dense arguments over one key block, transposed so that lanes are lanes.
template <class E>
struct DenseBlock {
  const uint32_t* visible;         // null, or a bit for each lane, [kBlockKeys]
  const typename E::Scalar* bias;  // null, or [kBlockKeys][kLanes]
};

// What the score tiles of one call share.
template <class E>
struct ScoreRules {
  using Scalar = typename E::Scalar;
  int64_t steps;   // lanes of operands a row: ceil(D / depth)
  Scalar factor;   // multiplies the products; 1 where the scale went into the query
  Scalar softcap;  // 0 = none
  bool alibi;
  int64_t output_stride;  // padded Dv
  bool natural;           // scores are natural logarithms (general tiles), else to base 2

  double to_log2() const { return natural ? kLog2E : 1.0; }
  double to_natural() const { return natural ? 1.0 : kLn2; }
};

// Where a tile finds its operands and leaves its probabilities.
template <class E>
struct TileContext {
  Panel<E>& panel;
  const ScoreRules<E>& rules;
  DenseBlock<E> dense;
  typename E::Scalar* probs;  // [strip][kBlockKeys / depth][kRows] lanes of operands
  int64_t written;            // first key of the block whose probabilities have been written
};

template <class E>
using TileFn = void (*)(TileContext<E>& context, const char* key, int64_t key_stride, int64_t block_key);

template <class E>
FASTATTN_INLINE void multiply_keys(typename E::Reg (&s)[E::kKeys][E::kVectors], const char* key, int64_t key_stride,
                                   const typename E::Scalar* query, int64_t steps) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
#pragma GCC unroll 8
  for (int r = 0; r < E::kKeys; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < E::kVectors; ++v) {
      s[r][v] = V::zero();
    }
  }
  for (int64_t k = 0; k < steps; ++k) {
    typename E::Reg q[E::kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < E::kVectors; ++v) {
      q[v] = V::load(query + k * E::kLanes + v * E::kWidth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < E::kKeys; ++r) {
      Scalar lane;  // bfloat16 pairs may lie at odd addresses
      memcpy(&lane, key + r * key_stride + k * static_cast<int64_t>(sizeof(Scalar)), sizeof lane);
      const auto broadcast = V::set1(lane);
#pragma GCC unroll 4
      for (int v = 0; v < E::kVectors; ++v) {
        s[r][v] = E::Product::run(broadcast, q[v], s[r][v]);
      }
    }
  }
}

// Moves the shift of every lane whose maximum rose too far, and rescales what was summed under the old one. Which lanes
// move depends on the lane alone.
template <class E>
FASTATTN_NOINLINE void raise_shift(TileContext<E>& context, const typename E::Scalar* peak, int64_t block_key) {
  using Scalar = typename E::Scalar;
  Panel<E>& panel = context.panel;
  const ScoreRules<E>& rules = context.rules;
  const auto rise = static_cast<Scalar>(kLazyRise / rules.to_log2());
  for (int lane = 0; lane < E::kLanes; ++lane) {
    if (!(peak[lane] > panel.limit[lane])) {
      continue;
    }
    const Scalar old = panel.shift[lane];
    const bool first = panel.limit[lane] == -static_cast<Scalar>(__builtin_inf());
    // Whole powers of two where scores are to base 2: rescaling is then exact.
    const Scalar shift = rules.natural ? peak[lane] : static_cast<Scalar>(__builtin_ceil(peak[lane]));
    panel.shift[lane] = shift;
    panel.limit[lane] = shift + rise;
    if (first) {
      continue;
    }
    const auto scale =
        static_cast<Scalar>(::exp2((static_cast<double>(old) - static_cast<double>(shift)) * rules.to_log2()));
    panel.sum[lane] *= scale;
    panel.block_sum[lane] *= scale;
    Scalar* output = panel.output + lane * context.rules.output_stride;
    for (int64_t d = 0; d < context.rules.output_stride; ++d) {
      output[d] *= scale;
    }
    Scalar* probs = context.probs + lane / E::kRows * (E::kBlockKeys / E::kDepth) * E::kRows + lane % E::kRows;
    for (int64_t step = context.written / E::kDepth; step < block_key / E::kDepth; ++step) {
      probs[step * E::kRows] = E::Product::scale_probability(probs[step * E::kRows], scale);
    }
  }
}

// Probabilities of a tile of final scores: maximum, exponential, sum, store.
template <class E, bool kNatural>
FASTATTN_INLINE void softmax_tile(TileContext<E>& context, typename E::Reg (&s)[E::kKeys][E::kVectors],
                                  int64_t block_key) {
  using V = typename E::V;
  using Reg = typename E::Reg;
  using Scalar = typename E::Scalar;
  constexpr bool kScaled = kNatural || E::Product::kScaleQuery;  // else s is to be multiplied by rules.factor
  Panel<E>& panel = context.panel;
  const Reg factor = V::set1(context.rules.factor);
  Reg peak[E::kVectors];
  bool rises = false;
#pragma GCC unroll 4
  for (int v = 0; v < E::kVectors; ++v) {
    peak[v] = V::set1(-static_cast<Scalar>(__builtin_inf()));
#pragma GCC unroll 8
    for (int r = 0; r < E::kKeys; ++r) {
      peak[v] = V::max(s[r][v], peak[v]);  // a NaN score is passed over
    }
    if constexpr (!kScaled) {
      peak[v] = V::mul(peak[v], factor);
    }
    rises |= V::any(V::less(V::load(panel.limit + v * E::kWidth), peak[v]));
  }
  if (FASTATTN_UNLIKELY(rises)) {
    // The scores go to memory and back by hand, lest the compiler keep them there on the common path too.
    alignas(64) Scalar kept[E::kKeys][E::kLanes];
    alignas(64) Scalar peaks[E::kLanes];
    for (int v = 0; v < E::kVectors; ++v) {
      V::store(peaks + v * E::kWidth, peak[v]);
      for (int r = 0; r < E::kKeys; ++r) {
        V::store(&kept[r][v * E::kWidth], s[r][v]);
      }
    }
    raise_shift<E>(context, peaks, block_key);
#pragma GCC unroll 4
    for (int v = 0; v < E::kVectors; ++v) {
#pragma GCC unroll 8
      for (int r = 0; r < E::kKeys; ++r) {
        s[r][v] = V::load(&kept[r][v * E::kWidth]);
      }
    }
  }
  constexpr int kParts = E::kWidth / E::kRows;
  constexpr int64_t kStripStride = int64_t{E::kBlockKeys} / E::kDepth * E::kRows;
#pragma GCC unroll 4
  for (int v = 0; v < E::kVectors; ++v) {
    const Reg shift = V::load(panel.shift + v * E::kWidth);
    Reg sum = V::load(panel.block_sum + v * E::kWidth);
    Scalar* out = context.probs + v * kParts * kStripStride + block_key / E::kDepth * E::kRows;
#pragma GCC unroll 8
    for (int r = 0; r < E::kKeys; r += E::kDepth) {
      Reg prob[E::kDepth];
#pragma GCC unroll 2
      for (int i = 0; i < E::kDepth; ++i) {
        Reg x;
        if constexpr (kNatural) {
          x = V::mul(V::sub(s[r + i][v], shift), V::set1(static_cast<Scalar>(kLog2E)));
        } else if constexpr (kScaled) {
          x = V::sub(s[r + i][v], shift);
        } else {
          x = V::fms(s[r + i][v], factor, shift);
        }
        prob[i] = exp2<V, E::Product::kExpPrecision>(x);
        sum = V::add(sum, prob[i]);
      }
      const Reg operand = E::Product::probabilities(prob);
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        V::template store_part<E::kRows>(out + part * kStripStride + r / E::kDepth * E::kRows, operand, part);
      }
    }
    V::store(panel.block_sum + v * E::kWidth, sum);
  }
}

// Scores that a lane may not see become -inf, whatever they were.
template <class E>
FASTATTN_INLINE void hide_scores(const TileContext<E>& context, typename E::Reg (&s)[E::kKeys][E::kVectors],
                                 int64_t block_key) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  const Panel<E>& panel = context.panel;
  const auto hidden = V::set1(-static_cast<Scalar>(__builtin_inf()));
  const uint32_t* visible = context.dense.visible;
#pragma GCC unroll 4
  for (int v = 0; v < E::kVectors; ++v) {
    const auto first = V::load(panel.block_first + v * E::kWidth);
    const auto last = V::load(panel.block_last + v * E::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < E::kKeys; ++r) {
      const auto key = V::set1(static_cast<Scalar>(block_key + r));
      auto seen = V::both(V::less_equal(first, key), V::less(key, last));
      if (visible != nullptr) {
        seen = V::both(seen, V::from_bits(visible[block_key + r] >> (v * E::kWidth)));
      }
      s[r][v] = V::select(seen, s[r][v], hidden);
    }
  }
}

// Scale, softcap, bias and ALiBi, in this order.
template <class E>
FASTATTN_INLINE void adjust_scores(const TileContext<E>& context, typename E::Reg (&s)[E::kKeys][E::kVectors],
                                   int64_t block_key) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  const Panel<E>& panel = context.panel;
  const ScoreRules<E>& rules = context.rules;
  const auto factor = V::set1(rules.factor);
  const auto cap = V::set1(rules.softcap);
  const auto inverse_cap = V::set1(rules.softcap > 0 ? 1 / rules.softcap : 0);
  for (int r = 0; r < E::kKeys; ++r) {
    const auto key = V::set1(static_cast<Scalar>(block_key + r));
    for (int v = 0; v < E::kVectors; ++v) {
      auto x = s[r][v];
      if constexpr (!E::Product::kScaleQuery) {
        x = V::mul(x, factor);
      }
      if (rules.softcap > 0) {
        x = V::mul(tanh<V>(V::mul(x, inverse_cap)), cap);
      }
      if (context.dense.bias != nullptr) {
        x = V::add(x, V::load(context.dense.bias + (block_key + r) * E::kLanes + v * E::kWidth));
      }
      if (rules.alibi) {
        const auto distance = V::abs(V::sub(V::load(panel.block_position + v * E::kWidth), key));
        x = V::sub(x, V::mul(V::load(panel.slope + v * E::kWidth), distance));
      }
      s[r][v] = x;
    }
  }
}

template <class E>
FASTATTN_NOINLINE void multiply_keys_to(typename E::Scalar* raw, const char* key, int64_t key_stride,
                                        const typename E::Scalar* query, int64_t steps) {
  typename E::Reg s[E::kKeys][E::kVectors];
  multiply_keys<E>(s, key, key_stride, query, steps);
#pragma GCC unroll 8
  for (int r = 0; r < E::kKeys; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < E::kVectors; ++v) {
      E::V::store(raw + r * E::kLanes + v * E::kWidth, s[r][v]);
    }
  }
}

template <class E, TileKind kind>
FASTATTN_NOINLINE void score_tile(TileContext<E>& context, const char* key, int64_t key_stride, int64_t block_key) {
  typename E::Reg s[E::kKeys][E::kVectors];
  if constexpr (E::kFused) {
    multiply_keys<E>(s, key, key_stride, context.panel.query, context.rules.steps);
  } else {
    // With 16 registers the softmax's temporaries would push accumulators out of the product's loop.
    alignas(64) typename E::Scalar raw[E::kKeys * E::kLanes];
    multiply_keys_to<E>(raw, key, key_stride, context.panel.query, context.rules.steps);
#pragma GCC unroll 8
    for (int r = 0; r < E::kKeys; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < E::kVectors; ++v) {
        s[r][v] = E::V::load(raw + r * E::kLanes + v * E::kWidth);
      }
    }
  }
  if constexpr (kind == TileKind::general) {
    adjust_scores<E>(context, s, block_key);
  }
  if constexpr (kind != TileKind::plain) {
    hide_scores<E>(context, s, block_key);
  }
  softmax_tile<E, kind == TileKind::general>(context, s, block_key);
}

// Sets the shift of each lane from the tile where its diagonal lies, so that ALiBi's rise towards the diagonal does not
// move it tile after tile. A lane's seed depends on its own visible scores alone.
template <class E>
FASTATTN_NOINLINE void seed_shift(TileContext<E>& context, const char* key, int64_t key_stride, int64_t block_key,
                                  const bool (&wanted)[E::kLanes]) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  typename E::Reg s[E::kKeys][E::kVectors];
  multiply_keys<E>(s, key, key_stride, context.panel.query, context.rules.steps);
  adjust_scores<E>(context, s, block_key);
  hide_scores<E>(context, s, block_key);
  alignas(64) Scalar peaks[E::kLanes];
  for (int v = 0; v < E::kVectors; ++v) {
    auto peak = V::set1(-static_cast<Scalar>(__builtin_inf()));
    for (int r = 0; r < E::kKeys; ++r) {
      peak = V::max(s[r][v], peak);
    }
    V::store(peaks + v * E::kWidth, peak);
  }
  for (int lane = 0; lane < E::kLanes; ++lane) {
    if (!wanted[lane]) {
      peaks[lane] = -static_cast<Scalar>(__builtin_inf());
    }
  }
  raise_shift<E>(context, peaks, 0);
}

}  // namespace
}  // namespace fastattn
