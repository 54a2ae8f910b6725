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

// Method::rows: kLanesAtOnce query rows, `query` elements apart, dotted with each key. Rows are read in order, far
// ahead of their use: that decides the speed of a product that reads each key once.
template <class E, int kLanesAtOnce>
FASTATTN_INLINE void dot_rows(typename E::Scalar* raw, const char* key, int64_t key_stride,
                              const typename E::Scalar* query, int64_t head_dim, int64_t query_stride) {
  using V = typename E::V;
  using Source = typename E::Source;
  typename E::Reg sum[kLanesAtOnce][E::kKeys];
#pragma GCC unroll 2
  for (int lane = 0; lane < kLanesAtOnce; ++lane) {
#pragma GCC unroll 8
    for (int r = 0; r < E::kKeys; ++r) {
      sum[lane][r] = V::zero();
    }
  }
  for (int64_t d = 0; d < head_dim; d += E::kWidth) {
    const int count = static_cast<int>(min64(E::kWidth, head_dim - d));
    typename E::Reg q[kLanesAtOnce];
#pragma GCC unroll 2
    for (int lane = 0; lane < kLanesAtOnce; ++lane) {
      q[lane] = V::load(query + lane * query_stride + d);
    }
#pragma GCC unroll 8
    for (int r = 0; r < E::kKeys; ++r) {
      const auto* row = reinterpret_cast<const Source*>(key + r * key_stride) + d;
      const auto x = count == E::kWidth ? V::load(row) : V::load_partial(row, count);
#pragma GCC unroll 2
      for (int lane = 0; lane < kLanesAtOnce; ++lane) {
        sum[lane][r] = V::fma(x, q[lane], sum[lane][r]);
      }
    }
  }
#pragma GCC unroll 2
  for (int lane = 0; lane < kLanesAtOnce; ++lane) {
    V::sum_lanes(sum[lane], raw + lane * E::kBlockKeys);
  }
}

// Rows ahead of the product that reads them once, fetched into the second-level cache: 32 rows, four tiles.
constexpr int64_t kPrefetchRows = 32;

inline void prefetch_rows(const char* rows, int64_t stride, int64_t count, int64_t bytes) {
  const char* ahead = rows + kPrefetchRows * stride;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t b = 0; b < bytes; b += 64) {
      __builtin_prefetch(ahead + r * stride + b, 0, 2);
    }
  }
}

// Scores to memory: raw[key][lane], lanes of the first kActive vectors; for Method::rows raw[lane][kBlockKeys].
template <class E, int kActive>
FASTATTN_NOINLINE void multiply_keys_to(typename E::Scalar* raw, const char* key, int64_t key_stride,
                                        const Panel<E>& panel, int64_t steps) {
  if constexpr (E::kMethod == Method::tiles) {
    E::template multiply_tiles<kActive>(key, key_stride, panel.query, steps);
    E::template store_tiles<kActive>(raw);
  } else if constexpr (E::kMethod == Method::rows) {
    const int64_t query_stride = round_up(steps, E::kWidth);
    prefetch_rows(key, key_stride, E::kKeys, steps * static_cast<int64_t>(sizeof(typename E::Source)));
    int lane = 0;
    for (; lane + E::kLanesAtOnce <= panel.live; lane += E::kLanesAtOnce) {
      dot_rows<E, E::kLanesAtOnce>(raw + lane * E::kBlockKeys, key, key_stride, panel.query + lane * query_stride,
                                   steps, query_stride);
    }
    for (; lane < panel.live; ++lane) {
      dot_rows<E, 1>(raw + lane * E::kBlockKeys, key, key_stride, panel.query + lane * query_stride, steps,
                     query_stride);
    }
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
