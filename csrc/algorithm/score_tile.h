// The softmax over tiles of scores, kKeys keys by kLanes queries: what is added, what is hidden, and probabilities.
#pragma once

#include "algorithm/key_product.h"
#include "algorithm/shift.h"

namespace fastattn {
namespace {

// What dropout multiplies the probabilities of kCount keys by: out[key][lane].
template <class E, int kCount>
FASTATTN_NOINLINE void draw_kept(const Panel<E>& panel, const Dropout& dropout, int64_t block_key,
                                 typename E::Scalar* out) {
  const int64_t begin = panel.block + block_key;
  for (int64_t four = begin / 4; four * 4 < begin + kCount; ++four) {
    uint32_t words[4][E::kLanes];
    for (int lane = 0; lane < E::kLanes; ++lane) {
      words[0][lane] = static_cast<uint32_t>(panel.row[lane]);
      words[1][lane] = static_cast<uint32_t>(four);
      words[2][lane] = static_cast<uint32_t>(panel.first_head + panel.head[lane]);
      words[3][lane] = dropout.offset;
    }
    philox<E::kLanes>(words, dropout.seed);
    for (int word = 0; word < 4; ++word) {
      const int64_t at = four * 4 + word - begin;
      for (int lane = 0; at >= 0 && at < kCount && lane < E::kLanes; ++lane) {
        out[at * E::kLanes + lane] = static_cast<typename E::Scalar>(kept(dropout, words[word][lane]));
      }
    }
  }
}

// What dropout multiplies the probabilities of a tile by, or null.
template <class E, bool kNatural>
FASTATTN_INLINE const typename E::Scalar* tile_kept(const TileContext<E>& context, int64_t block_key) {
  if (!kNatural || context.rules.dropout.threshold == 0) {
    return nullptr;
  }
  draw_kept<E, E::kKeys>(context.panel, context.rules.dropout, block_key, context.kept);
  return context.kept;
}

// Probabilities of a group of final scores under the lanes' shifts: exponential, sum, store. `kept`: see tile_kept.
template <class E, bool kNatural, int kActive>
FASTATTN_INLINE void exponentiate(TileContext<E>& context, const Scores<E, kActive>& s, int64_t block_key,
                                  const typename E::Scalar* kept) {
  using V = typename E::V;
  using Reg = typename E::Reg;
  using Scalar = typename E::Scalar;
  Panel<E>& panel = context.panel;
  const Reg factor = V::set1(context.rules.factor);
  Scalar* observed = nullptr;
  Scalar* shifts = nullptr;
  if constexpr (E::kObserves) {
    observed = panel.block_probs(panel.block) + block_key * E::kLanes;
    shifts = panel.group_shifts(panel.block, block_key);
  }
  constexpr int kPart = E::kRows < E::kWidth ? E::kRows : E::kWidth;  // lanes of a vector that stand in one strip
#pragma GCC unroll 4
  for (int v = 0; v < kActive; ++v) {
    const Reg shift = V::load(panel.shift + v * E::kWidth);
    Reg sum = V::load(panel.block_sum + v * E::kWidth);
    Reg log_sum = sum;
    if constexpr (E::kObserves) {
      log_sum = V::load(panel.block_log + v * E::kWidth);
      V::store(shifts + v * E::kWidth, shift);
    }
#pragma GCC unroll 8
    for (int r = 0; r < E::kGroupKeys; r += E::kDepth) {
      Reg prob[E::kDepth];
#pragma GCC unroll 2
      for (int i = 0; i < E::kDepth; ++i) {
        Reg x;
        if constexpr (kNatural) {
          x = V::mul(V::sub(s[r + i][v], shift), V::set1(static_cast<Scalar>(kLog2E)));
        } else if constexpr (kScaled<E, kNatural>) {
          x = V::sub(s[r + i][v], shift);
        } else {
          // Not fused: the shift is such a rounded product, and far scores must meet it exactly.
          x = V::sub(V::mul(s[r + i][v], factor), shift);
        }
        prob[i] = E::Product::power(x);
        sum = V::add(sum, prob[i]);
        if constexpr (E::kObserves) {  // where a probability is 0, its logarithm must not be infinite
          log_sum = V::fma(prob[i], V::max(V::set1(V::kZeroPower), x), log_sum);
          V::store(observed + (r + i) * E::kLanes + v * E::kWidth, prob[i]);
        }
        if (kNatural && kept != nullptr) {
          prob[i] = V::mul(prob[i], V::load(kept + (r + i) * E::kLanes + v * E::kWidth));
        }
      }
      Reg operand[E::kPlanes];
      E::Product::pack_probs(prob, operand);
#pragma GCC unroll 2
      for (int part = 0; part < E::kWidth / kPart; ++part) {
        const int64_t index = prob_index<E>(v * E::kWidth + part * kPart, block_key + r) / E::kDepth;
#pragma GCC unroll 2
        for (int plane = 0; plane < E::kPlanes; ++plane) {
          V::template store_part<kPart>(context.probs + plane * kPlaneSize<E> + index, operand[plane], part);
        }
      }
    }
    V::store(panel.block_sum + v * E::kWidth, sum);
    if constexpr (E::kObserves) {
      V::store(panel.block_log + v * E::kWidth, log_sum);
    }
  }
}

// Scores that a lane may not see become -inf, whatever they were.
template <class E, int kActive>
FASTATTN_INLINE void hide_scores(const TileContext<E>& context, Scores<E, kActive>& s, int64_t block_key) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  const Panel<E>& panel = context.panel;
  const auto hidden = V::set1(-static_cast<Scalar>(__builtin_inf()));
  const uint32_t* visible = context.dense.visible;
  if (visible != nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < E::kGroupKeys; ++r) {
      const uint32_t bits = visible[block_key + r];
#pragma GCC unroll 4
      for (int v = 0; v < kActive; ++v) {
        s[r][v] = V::select(V::from_bits(bits >> (v * E::kWidth)), s[r][v], hidden);
      }
    }
  }
  if (!context.edge) {
    return;
  }
#pragma GCC unroll 4
  for (int v = 0; v < kActive; ++v) {
    const auto first = V::load(panel.block_first + v * E::kWidth);
    const auto last = V::load(panel.block_last + v * E::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < E::kGroupKeys; ++r) {
      const auto key = V::set1(static_cast<Scalar>(block_key + r));
      s[r][v] = V::select(V::both(V::less_equal(first, key), V::less(key, last)), s[r][v], hidden);
    }
  }
}

template <class E>
FASTATTN_INLINE typename E::Reg scale_score(const ScoreRules<E>& rules, typename E::Reg x) {
  return E::Product::kScaleQuery ? x : E::V::mul(x, E::V::set1(rules.factor));
}

// Scale and softcap of products that lie anywhere.
template <class E, int kActive>
FASTATTN_NOINLINE void cap_far_scores(const ScoreRules<E>& rules, typename E::Scalar* raw) {
  using V = typename E::V;
  const auto cap = V::set1(rules.softcap);
  const auto inverse = V::set1(1 / rules.softcap);
  for (int r = 0; r < E::kGroupKeys; ++r) {
    for (int v = 0; v < kActive; ++v) {
      auto* at = raw + r * E::kLanes + v * E::kWidth;
      V::store(at, softcap<V>(scale_score<E>(rules, V::load(at)), cap, inverse));
    }
  }
}

// Scale and softcap of a group of products; `raw` is where they lie in memory, if they do. Where all are near 0, as
// most are, a polynomial is enough.
template <class E, int kActive>
FASTATTN_INLINE void cap_scores(const ScoreRules<E>& rules, Scores<E, kActive>& s, typename E::Scalar* raw) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  auto largest = V::zero();
#pragma GCC unroll 8
  for (int r = 0; r < E::kGroupKeys; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kActive; ++v) {
      largest = V::max(V::abs(s[r][v]), largest);  // a NaN is passed over: either formula keeps it
    }
  }
  const auto inverse = V::set1(1 / rules.softcap);
  const auto ratio = V::mul(scale_score<E>(rules, largest), inverse);
  if (V::any(V::less_equal(V::set1(TanhTerms<Scalar>::kLimit), ratio))) {
    if constexpr (E::kMethod == Method::tiles) {
      cap_far_scores<E, kActive>(rules, raw);
      load_scores<E, kActive>(raw, s);
    } else {
      alignas(64) Scalar kept[E::kGroupKeys * E::kLanes];
      store_scores<E, kActive>(kept, s);
      cap_far_scores<E, kActive>(rules, kept);
      load_scores<E, kActive>(kept, s);
    }
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < E::kGroupKeys; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kActive; ++v) {
      s[r][v] = softcap_near<V>(scale_score<E>(rules, s[r][v]), inverse);
    }
  }
}

// Keys ahead of the bias that a tile adds, fetched: four tiles. Without it a bias of 2048 by 2048 cost 3 to 9% more;
// other distances were not tried.
constexpr int64_t kBiasAhead = 32;

// Scale, softcap, bias and ALiBi, in this order. `raw`: see cap_scores.
template <class E, int kActive>
FASTATTN_INLINE void adjust_scores(const TileContext<E>& context, Scores<E, kActive>& s, int64_t block_key,
                                   typename E::Scalar* raw) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  const Panel<E>& panel = context.panel;
  const ScoreRules<E>& rules = context.rules;
  if (rules.softcap > 0) {
    cap_scores<E, kActive>(rules, s, raw);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < E::kGroupKeys; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kActive; ++v) {
        s[r][v] = scale_score<E>(rules, s[r][v]);
      }
    }
  }
  if (context.dense.bias != nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < E::kGroupKeys; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kActive; ++v) {
        const Scalar* bias = context.dense.bias + (block_key + r) * E::kLanes + v * E::kWidth;
        __builtin_prefetch(bias + kBiasAhead * E::kLanes, 0, 3);
        s[r][v] = V::add(s[r][v], V::load(bias));
      }
    }
  }
  if (rules.alibi) {
#pragma GCC unroll 4
    for (int v = 0; v < kActive; ++v) {
      const auto position = V::load(panel.block_position + v * E::kWidth);
      const auto falling = V::sub(V::zero(), V::load(panel.slope + v * E::kWidth));
#pragma GCC unroll 8
      for (int r = 0; r < E::kGroupKeys; ++r) {
        const auto distance = V::abs(V::sub(position, V::set1(static_cast<Scalar>(block_key + r))));
        s[r][v] = V::fma(falling, distance, s[r][v]);
      }
    }
  }
}

// What the tile's kind adds and hides. `raw`: see cap_scores.
template <class E, TileKind kind, int kActive>
FASTATTN_INLINE void finish_scores(const TileContext<E>& context, Scores<E, kActive>& s, int64_t block_key,
                                   typename E::Scalar* raw) {
  if constexpr (adjusts(kind)) {
    adjust_scores<E, kActive>(context, s, block_key, raw);
  }
  if constexpr (hides(kind)) {
    hide_scores<E, kActive>(context, s, block_key);
  }
}

// Scores of one tile.
template <class E, TileKind kind, int kActive>
FASTATTN_INLINE void multiply_tile(const TileContext<E>& context, Scores<E, kActive>& s, TileRows key,
                                   int64_t block_key) {
  if constexpr (E::kFused) {
    multiply_keys<E, kActive>(s, key.rows, key.stride, context.panel.query, context.rules.steps);
  } else {
    alignas(64) typename E::Scalar raw[E::kKeys * E::kLanes];
    multiply_keys_to<E, kActive>(raw, key.rows, key.stride, context.panel, context.rules.steps);
    load_scores<E, kActive>(raw, s);
  }
  finish_scores<E, kind, kActive>(context, s, block_key, nullptr);
}

// Products, scores, probabilities of one tile in one go.
template <class E, TileKind kind, int kActive>
FASTATTN_NOINLINE void score_tile(TileContext<E>& context, TileRows key, int64_t block_key) {
  constexpr bool kNatural = adjusts(kind);
  const auto* kept = tile_kept<E, kNatural>(context, block_key);
  Scores<E, kActive> s;
  multiply_tile<E, kind, kActive>(context, s, key, block_key);
  follow_peak<E, kNatural, kActive>(context, s, block_key);
  exponentiate<E, kNatural, kActive>(context, s, block_key, kept);
}

// Sets the shift of each lane from the tile where its diagonal lies, so that ALiBi's rise towards the diagonal does not
// move it tile after tile. A lane's seed depends on its own visible scores alone. Method::broadcast, where a tile is a
// group.
template <class E>
FASTATTN_NOINLINE void seed_shift(TileContext<E>& context, TileRows key, int64_t block_key,
                                  const bool (&wanted)[E::kLanes]) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  const auto lowest = -static_cast<Scalar>(__builtin_inf());
  Scores<E, E::kVectors> s;
  multiply_keys<E, E::kVectors>(s, key.rows, key.stride, context.panel.query, context.rules.steps);
  finish_scores<E, TileKind::adjusted_masked, E::kVectors>(context, s, block_key, nullptr);
  typename E::Reg peak[E::kVectors];
  for (auto& highest : peak) {
    highest = V::set1(lowest);
  }
  find_peak<E, E::kVectors>(s, peak);
  alignas(64) Scalar peaks[E::kLanes];
  for (int v = 0; v < E::kVectors; ++v) {
    V::store(peaks + v * E::kWidth, peak[v]);
  }
  for (int lane = 0; lane < E::kLanes; ++lane) {
    peaks[lane] = wanted[lane] ? peaks[lane] : lowest;
  }
  raise_shift<E>(context, peaks, 0);
}

}  // namespace
}  // namespace fastattn
