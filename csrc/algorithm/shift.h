// What is subtracted from a lane's scores before they become probabilities: it follows their maximum, and what was
// summed under an older one is rescaled.
#pragma once

#include "algorithm/tile_context.h"

namespace fastattn {
namespace {

// Multiplies what one lane has summed.
template <class E>
inline void rescale_output(TileContext<E>& context, int lane, typename E::Scalar scale) {
  const int64_t stride = context.rules.output_stride;
  typename E::Scalar* output = context.panel.output + lane * stride;
  for (int64_t d = 0; d < stride; ++d) {
    output[d] *= scale;
  }
}

// Multiplies the probabilities of the running block before `block_key`, all lanes of a strip together, by 1 where
// nothing changed. Other methods know the block's maximum before its first exponential.
template <class E>
inline void rescale_probabilities(TileContext<E>& context, const typename E::Scalar* scales, int64_t block_key) {
  using V = typename E::V;
  static_assert(E::kWidth % E::kRows == 0 && E::kGroupKeys / E::kDepth * E::kRows % E::kWidth == 0);
  for (int strip = 0; strip < context.panel.live; strip += E::kRows) {
    alignas(64) typename E::Scalar lanes[E::kWidth];
    bool rescales = false;
    for (int i = 0; i < E::kWidth; ++i) {
      lanes[i] = scales[strip + i % E::kRows];
      rescales |= lanes[i] != 1;
    }
    const auto scale = V::load(lanes);
    typename E::Scalar* prob = context.probs + prob_index<E>(strip, context.written) / E::kDepth;
    typename E::Scalar* const end = prob + (block_key - context.written) / E::kDepth * E::kRows;
    for (; rescales && prob < end; prob += E::kWidth) {
      V::store(prob, E::Product::scale_probabilities(V::load(prob), scale));
    }
  }
}

// Where outputs of all lanes lie side by side they are multiplied together, by 1 where nothing changed.
template <class E>
inline void rescale_columns(TileContext<E>& context, const typename E::Scalar* scales) {
  using V = typename E::V;
  for (int v = 0; v < E::kVectors; ++v) {
    const auto scale = V::load(scales + v * E::kWidth);
    for (int64_t d = 0; d < context.rules.output_stride; ++d) {
      auto* sums = context.panel.output + d * E::kLanes + v * E::kWidth;
      V::store(sums, V::mul(V::load(sums), scale));
    }
  }
}

// Moves the shift of every lane whose maximum rose too far, and rescales what was summed under the old one. Which lanes
// move depends on the lane alone.
template <class E>
FASTATTN_NOINLINE void raise_shift(TileContext<E>& context, const typename E::Scalar* peak, int64_t block_key) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  Panel<E>& panel = context.panel;
  const ScoreRules<E>& rules = context.rules;
  const double rise_log2 = kRoundsProbabilities<E> ? kRoundedLazyRise : kLazyRise;
  const auto rise = static_cast<Scalar>(rise_log2 / rules.to_log2());
  const auto headroom = static_cast<Scalar>(E::Product::kHeadroom / rules.to_log2());
  // Whole powers of two where scores are to base 2: rescaling is then exact.
  const bool whole = !rules.natural && !kRoundsProbabilities<E>;
  alignas(64) Scalar scales[E::kLanes];
  bool rescales = false;
  for (auto& scale : scales) {
    scale = 1;
  }
  uint64_t rising = 0;
  for (int v = 0; v < E::kVectors; ++v) {
    const int at = v * E::kWidth;
    rising |= uint64_t{V::bits(V::less(V::load(panel.limit + at), V::load(peak + at)))} << at;
  }
  rising &= (uint64_t{1} << (E::kMethod == Method::rows ? panel.live : panel.placed)) - 1;
  for (; rising != 0; rising &= rising - 1) {
    const int lane = __builtin_ctzll(rising);
    const auto old = static_cast<double>(panel.shift[lane]);
    const bool first = panel.limit[lane] == -static_cast<Scalar>(__builtin_inf());
    const Scalar level = whole ? static_cast<Scalar>(__builtin_ceil(peak[lane])) : peak[lane];
    // Headroom that the level's last place cannot hold is done without.
    const Scalar lowered = level - headroom;
    const Scalar error = level - lowered - headroom;
    const Scalar shift = error > -1 && error < 1 ? lowered : level;
    panel.shift[lane] = shift;
    panel.limit[lane] = level + rise;
    if (first) {
      continue;
    }
    const double lift = (static_cast<double>(shift) - old) * rules.to_log2();
    scales[lane] = static_cast<Scalar>(::exp2(-lift));
    rescales = true;
    if constexpr (E::kObserves) {
      panel.raise(lane, scales[lane], lift, {panel.sum[lane], panel.block_sum[lane]});
    }
    panel.sum[lane] *= scales[lane];
    panel.block_sum[lane] *= scales[lane];
    if (E::kMethod != Method::tiles && lane < panel.live) {
      rescale_output<E>(context, lane, scales[lane]);
    }
  }
  if (E::kMethod == Method::tiles && rescales) {
    rescale_columns<E>(context, scales);
  }
  if constexpr (E::kMethod == Method::broadcast) {
    if (rescales) {
      rescale_probabilities<E>(context, scales, block_key);
    }
  }
}

// Whether scores come out of the product as they are to be, or are to be multiplied by rules.factor.
template <class E, bool kNatural>
constexpr bool kScaled = kNatural || E::Product::kScaleQuery;

// The largest score of each lane, and `peak` before it. A NaN is passed over.
template <class E, int kActive>
FASTATTN_INLINE void find_peak(const Scores<E, kActive>& s, typename E::Reg (&peak)[kActive]) {
#pragma GCC unroll 4
  for (int v = 0; v < kActive; ++v) {
#pragma GCC unroll 8
    for (int r = 0; r < E::kGroupKeys; ++r) {
      peak[v] = E::V::max(s[r][v], peak[v]);
    }
  }
}

// Whether some lane's peak calls for another shift; multiplies the peaks by the factor where scores still need it.
template <class E, bool kNatural, int kActive>
FASTATTN_INLINE bool peak_rises(const TileContext<E>& context, typename E::Reg (&peak)[kActive]) {
  using V = typename E::V;
  bool rises = false;
#pragma GCC unroll 4
  for (int v = 0; v < kActive; ++v) {
    if constexpr (!kScaled<E, kNatural>) {
      peak[v] = V::mul(peak[v], V::set1(context.rules.factor));
    }
    rises |= V::any(V::less(V::load(context.panel.limit + v * E::kWidth), peak[v]));
  }
  return rises;
}

// Scores to memory and back.
template <class E, int kActive>
FASTATTN_INLINE void store_scores(typename E::Scalar* raw, const Scores<E, kActive>& s) {
#pragma GCC unroll 8
  for (int r = 0; r < E::kGroupKeys; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kActive; ++v) {
      E::V::store(raw + r * E::kLanes + v * E::kWidth, s[r][v]);
    }
  }
}

template <class E, int kActive>
FASTATTN_INLINE void load_scores(const typename E::Scalar* raw, Scores<E, kActive>& s) {
#pragma GCC unroll 8
  for (int r = 0; r < E::kGroupKeys; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kActive; ++v) {
      s[r][v] = E::V::load(raw + r * E::kLanes + v * E::kWidth);
    }
  }
}

// Notes a group of scores, whose peaks are given, after the panel's first blocks.
template <class E, int kActive>
FASTATTN_INLINE void observe_scores(TileContext<E>& context, Scores<E, kActive>& s,
                                    const typename E::Reg (&peak)[kActive], int64_t block_key) {
  using V = typename E::V;
  Panel<E>& panel = context.panel;
  bool any = false;
#pragma GCC unroll 4
  for (int v = 0; v < kActive; ++v) {
    any |= V::any(V::less(V::load(panel.threshold + v * E::kWidth), peak[v]));
  }
  if (FASTATTN_UNLIKELY(any)) {
    alignas(64) typename E::Scalar kept[E::kGroupKeys * E::kLanes];
    store_scores<E, kActive>(kept, s);
    panel.take(kept, panel.block + block_key);
    load_scores<E, kActive>(kept, s);
  }
}

// Follows the maximum of a group of scores.
template <class E, bool kNatural, int kActive>
FASTATTN_INLINE void follow_peak(TileContext<E>& context, Scores<E, kActive>& s, int64_t block_key) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  typename E::Reg peak[kActive];
#pragma GCC unroll 4
  for (int v = 0; v < kActive; ++v) {
    peak[v] = V::set1(-static_cast<Scalar>(__builtin_inf()));
  }
  find_peak<E, kActive>(s, peak);
  if constexpr (E::kObserves) {
    observe_scores<E, kActive>(context, s, peak, block_key);
  }
  if (FASTATTN_UNLIKELY((peak_rises<E, kNatural, kActive>(context, peak)))) {
    // The scores go to memory and back by hand, lest the compiler keep them there on the common path too.
    alignas(64) Scalar kept[E::kGroupKeys * E::kLanes];
    alignas(64) Scalar peaks[E::kLanes];
    store_scores<E, kActive>(kept, s);
    for (int v = 0; v < kActive; ++v) {
      V::store(peaks + v * E::kWidth, peak[v]);
    }
    for (int lane = kActive * E::kWidth; lane < E::kLanes; ++lane) {
      peaks[lane] = -static_cast<Scalar>(__builtin_inf());
    }
    raise_shift<E>(context, peaks, block_key);
    load_scores<E, kActive>(kept, s);
  }
}

}  // namespace
}  // namespace fastattn
