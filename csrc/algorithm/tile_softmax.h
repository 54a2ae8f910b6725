// The softmax in two passes over a block's scores in memory, so that its maximum is known before its first
// exponential: that of Method::tiles, and of the first blocks of a panel that observes, whose scores are kept anyway.
#pragma once

#include "algorithm/score_tile.h"

namespace fastattn {
namespace {

// The first pass makes a tile's products scores and finds the block's peak ...
template <class E, TileKind kind, int kActive>
FASTATTN_NOINLINE void scan_tile(TileContext<E>& context, int64_t block_key) {
  using V = typename E::V;
  typename E::Reg peak[kActive];
  for (int v = 0; v < kActive; ++v) {
    peak[v] = V::load(context.peaks + v * E::kWidth);
  }
  for (int64_t group = block_key; group < block_key + E::kKeys; group += E::kGroupKeys) {
    Scores<E, kActive> s;
    auto* raw = context.raw + group * E::kLanes;
    load_scores<E, kActive>(raw, s);
    if constexpr (kind != TileKind::plain) {
      finish_scores<E, kind, kActive>(context, s, group, raw);
      store_scores<E, kActive>(raw, s);
    }
    find_peak<E, kActive>(s, peak);
  }
  for (int v = 0; v < kActive; ++v) {
    V::store(context.peaks + v * E::kWidth, peak[v]);
  }
}

// The same from the keys, for engines that observe; the peaks of each group are kept too.
template <class E, TileKind kind, int kActive>
FASTATTN_NOINLINE void keep_tile(TileContext<E>& context, TileRows key, int64_t block_key) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  Scores<E, kActive> s;
  multiply_tile<E, kind, kActive>(context, s, key, block_key);
  store_scores<E, kActive>(context.raw + block_key * E::kLanes, s);
  typename E::Reg peak[kActive];
#pragma GCC unroll 4
  for (int v = 0; v < kActive; ++v) {
    peak[v] = V::set1(-static_cast<Scalar>(__builtin_inf()));
  }
  find_peak<E, kActive>(s, peak);
  Scalar* group = context.panel.group_peaks(context.panel.block + block_key);
#pragma GCC unroll 4
  for (int v = 0; v < kActive; ++v) {
    Scalar* highest = context.peaks + v * E::kWidth;
    V::store(group + v * E::kWidth, peak[v]);
    V::store(highest, V::max(peak[v], V::load(highest)));
  }
}

// ... the second, under a shift that holds for the whole block, makes them probabilities.
template <class E, bool kNatural, int kActive>
FASTATTN_NOINLINE void exponentiate_tile(TileContext<E>& context, int64_t block_key) {
  const auto* kept = tile_kept<E, kNatural>(context, block_key);
  for (int64_t group = block_key; group < block_key + E::kKeys; group += E::kGroupKeys) {
    Scores<E, kActive> s;
    load_scores<E, kActive>(context.raw + group * E::kLanes, s);
    exponentiate<E, kNatural, kActive>(context, s, group, kept);
    kept = kept == nullptr ? nullptr : kept + E::kGroupKeys * E::kLanes;
  }
}

// Between the two.
template <class E, bool kNatural>
inline void follow_block_peak(TileContext<E>& context) {
  typename E::Reg peak[E::kVectors];
  for (int v = 0; v < E::kVectors; ++v) {
    peak[v] = E::V::load(context.peaks + v * E::kWidth);
  }
  if (peak_rises<E, kNatural, E::kVectors>(context, peak)) {
    for (int v = 0; v < E::kVectors; ++v) {
      E::V::store(context.peaks + v * E::kWidth, peak[v]);
    }
    raise_shift<E>(context, context.peaks, context.written);
  }
}

}  // namespace
}  // namespace fastattn
