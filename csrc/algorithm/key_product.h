// The first product: scores of kKeys keys by the queries of a panel.
#pragma once

#include "algorithm/panel.h"

namespace fastattn {
namespace {

// Method::broadcast: the scores stay in registers.
template <class E, int kActive>
FASTATTN_INLINE void multiply_keys(typename E::Reg (&s)[E::kGroupKeys][kActive], const char* key, int64_t key_stride,
                                   const typename E::Scalar* query, int64_t steps) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  typename E::Reg sum[E::kKeys][kActive];
#pragma GCC unroll 8
  for (int r = 0; r < E::kKeys; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kActive; ++v) {
      sum[r][v] = V::zero();
    }
  }
#pragma GCC unroll 2
  for (int64_t left = steps; left > 0; --left) {  // pointers move and one count falls: general registers are short
    typename E::Reg q[kActive];
#pragma GCC unroll 4
    for (int v = 0; v < kActive; ++v) {
      q[v] = V::load(query + v * E::kWidth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < E::kKeys; ++r) {
      Scalar lane;  // bfloat16 pairs may lie at odd addresses
      memcpy(&lane, key + r * key_stride, sizeof lane);
      const auto broadcast = V::set1(lane);
#pragma GCC unroll 4
      for (int v = 0; v < kActive; ++v) {
        sum[r][v] = E::Product::run(broadcast, q[v], sum[r][v]);
      }
    }
    query += E::kLanes;
    key += sizeof(Scalar);
  }
#pragma GCC unroll 8
  for (int r = 0; r < E::kKeys; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kActive; ++v) {
      s[r][v] = sum[r][v];
    }
  }
}

// Scores to memory: raw[key][lane], lanes of the first kActive vectors.
template <class E, int kActive>
FASTATTN_NOINLINE void multiply_keys_to(typename E::Scalar* raw, const char* key, int64_t key_stride,
                                        const Panel<E>& panel, int64_t steps) {
  if constexpr (E::kMethod == Method::tiles) {
    E::template multiply_tiles<kActive>(key, key_stride, panel.query, steps);
    E::template store_tiles<kActive>(raw);
  } else {
    typename E::Reg s[E::kKeys][kActive];
    multiply_keys<E, kActive>(s, key, key_stride, panel.query, steps);
#pragma GCC unroll 8
    for (int r = 0; r < E::kKeys; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kActive; ++v) {
        E::V::store(raw + r * E::kLanes + v * E::kWidth, s[r][v]);
      }
    }
  }
}

}  // namespace
}  // namespace fastattn
