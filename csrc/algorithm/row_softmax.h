// The softmax of Method::rows: a row's scores over a key block stand next to each other, keys are the lanes, and the
// block's maximum is known before its first exponential. Scores become probabilities in place, [lane][kBlockKeys].
#pragma once

#include "algorithm/shift.h"

namespace fastattn {
namespace {

// One row's dense terms over keys [begin, end) of the block, out of the tables whose lanes are rows.
template <class E>
struct RowTerms {
  using Scalar = typename E::Scalar;
  alignas(64) Scalar seen[E::kBlockKeys];  // 1 or 0
  alignas(64) Scalar bias[E::kBlockKeys];

  void gather(const DenseBlock<E>& dense, int lane, int64_t begin, int64_t end) {
    for (int64_t key = begin; dense.visible != nullptr && key < end; ++key) {
      seen[key] = static_cast<Scalar>((dense.visible[key] >> lane) & 1U);
    }
    for (int64_t key = begin; dense.bias != nullptr && key < end; ++key) {
      bias[key] = dense.bias[key * E::kLanes + lane];
    }
  }
};

// Softcap, bias and ALiBi on a vector of keys.
template <class E>
FASTATTN_INLINE typename E::Reg adjust_keys(const TileContext<E>& context, const RowTerms<E>& terms, int lane,
                                            int64_t key, typename E::Reg keys, typename E::Reg x) {
  using V = typename E::V;
  const ScoreRules<E>& rules = context.rules;
  if (rules.softcap > 0) {
    x = softcap<V>(x, V::set1(rules.softcap), V::set1(1 / rules.softcap));
  }
  if (context.dense.bias != nullptr) {
    x = V::add(x, V::load(terms.bias + key));
  }
  if (rules.alibi) {
    const auto distance = V::abs(V::sub(V::set1(context.panel.block_position[lane]), keys));
    x = V::fma(V::set1(-context.panel.slope[lane]), distance, x);
  }
  return x;
}

// Final scores of every row over keys [begin, end) of the block, whole vectors, and their maxima in context.peaks.
// `hides`: some key of these is hidden from some row.
template <class E, bool kGeneral>
FASTATTN_NOINLINE void scan_rows(TileContext<E>& context, int64_t begin, int64_t end, bool hides,
                                 const float* key_scales) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  const auto hidden = V::set1(-static_cast<Scalar>(__builtin_inf()));
  const Panel<E>& panel = context.panel;
  RowTerms<E> terms;
  for (int lane = 0; lane < panel.live; ++lane) {
    Scalar* row = context.probs + lane * E::kBlockKeys;
    terms.gather(context.dense, lane, begin, end);
    const auto first = V::set1(panel.block_first[lane]);
    const auto last = V::set1(panel.block_last[lane]);
    const auto factor = V::set1(E::Dot::kWords ? context.rules.factor * panel.query_scale[lane] : context.rules.factor);
    auto peak = hidden;
    for (int64_t key = begin; key < end; key += E::kWidth) {
      auto x = V::load(row + key);
      if constexpr (!E::Product::kScaleQuery) {
        x = V::mul(x, factor);
      }
      if constexpr (E::kQuantised) {
        x = V::mul(x, V::load(key_scales + key));
      }
      if (kGeneral || hides || E::kQuantised) {
        const auto keys = V::add(V::iota(), V::set1(static_cast<Scalar>(key)));
        if constexpr (kGeneral) {
          x = adjust_keys<E>(context, terms, lane, key, keys, x);
        }
        auto seen = V::both(V::less_equal(first, keys), V::less(keys, last));
        if (context.dense.visible != nullptr) {
          seen = V::both(seen, V::less(V::zero(), V::load(terms.seen + key)));
        }
        x = V::select(seen, x, hidden);
      }
      if (kGeneral || hides || E::kQuantised || !E::Product::kScaleQuery) {
        V::store(row + key, x);
      }
      peak = V::max(x, peak);  // a NaN is passed over
    }
    context.peaks[lane] = largest_lane<E>(peak);
  }
}

// Probabilities of every row under its shift.
template <class E, bool kNatural>
FASTATTN_NOINLINE void exponentiate_rows(TileContext<E>& context, int64_t begin, int64_t end) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  Panel<E>& panel = context.panel;
  Fetch fetch = context.fetch;
  for (int lane = 0; lane < panel.live; ++lane) {
    Scalar* row = context.probs + lane * E::kBlockKeys;
    const auto shift = V::set1(panel.shift[lane]);
    auto sum = V::zero();
    for (int64_t key = begin; key < end; key += E::kWidth) {
      auto x = V::sub(V::load(row + key), shift);
      if constexpr (kNatural) {
        x = V::mul(x, V::set1(static_cast<Scalar>(kLog2E)));
      }
      const auto prob = E::Product::power(x);
      sum = V::add(sum, prob);
      V::store(row + key, prob);
      fetch.step();
    }
    Scalar lanes[E::kWidth];
    V::store(lanes, sum);
    for (const Scalar x : lanes) {
      panel.block_sum[lane] += x;
    }
  }
}

// Dropout of every row's probabilities.
template <class E>
FASTATTN_NOINLINE void drop_rows(TileContext<E>& context, int64_t begin, int64_t end) {
  using Scalar = typename E::Scalar;
  constexpr int kCount = 16;
  const Panel<E>& panel = context.panel;
  const Dropout& dropout = context.rules.dropout;
  for (int lane = 0; lane < panel.live; ++lane) {
    Scalar* row = context.probs + lane * E::kBlockKeys;
    for (int64_t four = (panel.block + begin) / 4; four * 4 < panel.block + end; four += kCount) {
      uint32_t words[4][kCount];
      for (int i = 0; i < kCount; ++i) {
        words[0][i] = static_cast<uint32_t>(panel.row[lane]);
        words[1][i] = static_cast<uint32_t>(four + i);
        words[2][i] = static_cast<uint32_t>(panel.first_head + panel.head[lane]);
        words[3][i] = dropout.offset;
      }
      philox<kCount>(words, dropout.seed);
      for (int i = 0; i < 4 * kCount; ++i) {
        const int64_t key = four * 4 + i - panel.block;
        if (key >= begin && key < end) {
          row[key] *= static_cast<Scalar>(kept(dropout, words[i % 4][i / 4]));
        }
      }
    }
  }
}

// Multiplies every row's probabilities by what is a key's.
template <class E>
FASTATTN_NOINLINE void scale_rows(TileContext<E>& context, int64_t begin, int64_t end, const float* scales) {
  using V = typename E::V;
  for (int lane = 0; lane < context.panel.live; ++lane) {
    auto* row = context.probs + lane * E::kBlockKeys;
    for (int64_t key = begin; key < end; key += E::kWidth) {
      V::store(row + key, V::mul(V::load(row + key), V::load(scales + key)));
    }
  }
}

// Copies every row's scores to where they stay: kept(lane) is where those of the block do.
template <class E, class Kept>
FASTATTN_NOINLINE void keep_rows(const TileContext<E>& context, int64_t begin, int64_t end, Kept kept) {
  for (int lane = 0; lane < context.panel.live; ++lane) {
    memcpy(kept(lane) + begin, context.probs + lane * E::kBlockKeys + begin,
           static_cast<size_t>(end - begin) * sizeof(typename E::Scalar));
  }
}

// Scores to probabilities over keys [begin, end) of the block. `scales`: of quantised keys and values. `keeps`: see
// keep_rows.
template <class E, class Kept>
inline void row_softmax(TileContext<E>& context, int64_t begin, int64_t end, bool hides,
                        const float* const (&scales)[2], bool keeps, Kept kept) {
  const int64_t from = round_down(begin, E::kWidth);
  const int64_t to = round_up(end, E::kWidth);
  hides |= from != begin || to != end;
  const bool natural = context.rules.natural;
  (natural ? scan_rows<E, true> : scan_rows<E, false>)(context, from, to, hides, scales[0]);
  if (keeps) {
    keep_rows<E>(context, from, to, kept);
  }
  context.written = begin;
  raise_shift<E>(context, context.peaks, begin);
  (natural ? exponentiate_rows<E, true> : exponentiate_rows<E, false>)(context, from, to);
  if (context.rules.dropout.threshold > 0) {
    drop_rows<E>(context, from, to);
  }
  if constexpr (E::kQuantised) {
    scale_rows<E>(context, from, to, scales[1]);
  }
}

}  // namespace
}  // namespace fastattn
