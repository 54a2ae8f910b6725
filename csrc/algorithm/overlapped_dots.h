// Rows of queries dotted with rows of keys where arithmetic sets the pace: a key is read, and widened, once for all
// queries, and sums over lanes are totalled while the next keys are multiplied. (docs/decisions/0016)
#pragma once

#include <type_traits>

#include "algorithm/row_table.h"

namespace fastattn {
namespace {

// Sums of kQueries queries with two keys, and the steps that total them. After those of two keys, the sums of each
// query's lanes are kept until the next two keys' come: four totals are stored at once.
template <class E, int kQueries>
struct LaneTotals {
  using Reg = typename E::Reg;
  using Scalar = typename E::Scalar;
  using Sums = typename E::Dot::Sums;
  static constexpr int kQuads = (kQueries + 3) / 4;  // of queries, whose totals stand in one register
  static constexpr int kKeySteps = 3 * kQuads;
  static constexpr int kSteps = 2 * kKeySteps + 2 * kQuads;

  Reg sum[kQueries][2];
  Reg kept[kQuads];

  // Steps [kStep, kEnd). kStores: the sums join those kept, and raw[query][4 keys] gets the totals.
  template <int kStep, int kEnd, bool kStores>
  FASTATTN_INLINE void run(Scalar* raw) {
    if constexpr (kStep < kEnd) {
      if constexpr (kStep < 2 * kKeySteps) {
        add_lanes<kStep / kKeySteps, kStep % kKeySteps / 3 * 4, kStep % 3>();
      } else if constexpr (kStep < 2 * kKeySteps + kQuads) {
        constexpr int kQuad = kStep - 2 * kKeySteps;
        Reg& pairs = kStores ? sum[4 * kQuad][0] : kept[kQuad];
        pairs = Sums::add_pairs(sum[4 * kQuad][0], sum[4 * kQuad][1]);
      } else if constexpr (kStores) {
        constexpr int kQuad = kStep - 2 * kKeySteps - kQuads;
        const Reg totals = Sums::finish(Sums::add_pairs(kept[kQuad], sum[4 * kQuad][0]));
#pragma GCC unroll 4
        for (int q = 4 * kQuad; q < 4 * kQuad + 4 && q < kQueries; ++q) {
          E::V::template store_part<4>(raw + q * E::kBlockKeys, totals, q % 4);
        }
      }
      FASTATTN_KEEP_ORDER();
      run<kStep + 1, kEnd, kStores>(raw);
    }
  }

 private:
  // A key's sums of four queries from kQuery on, or as many as there are, to a quarter each of the first's.
  template <int kKey, int kQuery, int kStep>
  FASTATTN_INLINE void add_lanes() {
    constexpr int kThird = kQuery + 2 < kQueries ? kQuery + 2 : kQuery;
    if constexpr (kStep == 2) {
      sum[kQuery][kKey] = Sums::add_quarters(sum[kQuery][kKey], sum[kThird][kKey]);
    } else if constexpr (kStep == 0 || kThird != kQuery) {
      constexpr int kFirst = kStep == 0 ? kQuery : kThird;
      constexpr int kSecond = kFirst + 1 < kQueries ? kFirst + 1 : kFirst;
      sum[kFirst][kKey] = Sums::add_halves(sum[kFirst][kKey], sum[kSecond][kKey]);
    }
  }
};

// A vector of each of two keys, so many bytes into their rows.
template <class E>
FASTATTN_INLINE void load_two_keys(typename E::Reg (&x)[2], const char* const* keys, int64_t ahead, int64_t bytes) {
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    if (bytes % kLine == 0) {
      __builtin_prefetch(keys[k + ahead] + bytes, 0, 2);
    }
    x[k] = E::Dot::load(reinterpret_cast<const typename E::Read*>(keys[k] + bytes));
  }
}

// Their products with a vector of a query.
template <class E>
FASTATTN_INLINE void multiply_two_keys(typename E::Reg (&sum)[2], const typename E::Reg (&x)[2],
                                       const typename E::Scalar* query) {
  const auto lanes = E::V::load(query);
  FASTATTN_KEEP_ORDER();  // nor is it loaded for each product anew
  sum[0] = E::Dot::run(x[0], lanes, sum[0]);
  sum[1] = E::Dot::run(x[1], lanes, sum[1]);
}

// The first kVectors vectors of two keys by kQueries queries, from product kProduct on, and between the products the
// steps of `before`, the totals of the two keys before.
template <class E, int kQueries, int kVectors, bool kStores, int kProduct = 0>
FASTATTN_INLINE void multiply_and_total(typename E::Reg (&sum)[kQueries][2], typename E::Reg (&x)[2],
                                        const char* const* keys, int64_t ahead, const typename E::Scalar* query,
                                        int64_t query_stride, LaneTotals<E, kQueries>& before,
                                        typename E::Scalar* raw) {
  constexpr int kProducts = kVectors * kQueries;
  constexpr int kSteps = LaneTotals<E, kQueries>::kSteps;
  if constexpr (kProduct < kProducts) {
    constexpr int v = kProduct / kQueries;
    constexpr int q = kProduct % kQueries;
    if constexpr (q == 0) {
      load_two_keys<E>(x, keys, ahead, int64_t{v} * E::Dot::kElements * sizeof(typename E::Read));
    }
    multiply_two_keys<E>(sum[q], x, query + q * query_stride + v * E::kWidth);
    before.template run<kProduct * kSteps / kProducts, (kProduct + 1) * kSteps / kProducts, kStores>(raw);
    multiply_and_total<E, kQueries, kVectors, kStores, kProduct + 1>(sum, x, keys, ahead, query, query_stride, before,
                                                                     raw);
  }
}

// raw[query][key] for kQueries rows of queries, `stride` lanes apart, and `count` keys, whole groups of four, of whole
// vectors, kVectors or, without kAll, more; raw's rows are kBlockKeys long. `ahead`: how far ahead rows are asked for.
template <class E, int kQueries, int kVectors, bool kAll>
FASTATTN_NOINLINE void dot_overlapped(typename E::Scalar* raw, const char* const* keys, int64_t count,
                                      const typename E::Scalar* query, int64_t head_dim, int64_t stride,
                                      int64_t ahead) {
  using V = typename E::V;
  const int64_t query_stride = kAll ? int64_t{kVectors} * E::kWidth : stride;
  LaneTotals<E, kQueries> totals;
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) {
    totals.sum[q][0] = totals.sum[q][1] = V::zero();
  }
#pragma GCC unroll 2
  for (int quad = 0; quad < totals.kQuads; ++quad) {
    totals.kept[quad] = V::zero();
  }
  const auto take_two = [&](auto stores, const char* const* two, typename E::Scalar* to) FASTATTN_LAMBDA_INLINE {
    typename E::Reg sum[kQueries][2];
    typename E::Reg x[2];
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      sum[q][0] = sum[q][1] = V::zero();
    }
    multiply_and_total<E, kQueries, kVectors, decltype(stores)::value>(sum, x, two, ahead, query, query_stride, totals,
                                                                       to);
    for (int64_t v = kVectors; !kAll && v * E::Dot::kElements < head_dim; ++v) {
      load_two_keys<E>(x, two, ahead, v * E::Dot::kElements * int64_t{sizeof(typename E::Read)});
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) {
        multiply_two_keys<E>(sum[q], x, query + q * query_stride + v * E::kWidth);
      }
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      totals.sum[q][0] = sum[q][0];
      totals.sum[q][1] = sum[q][1];
    }
  };
  for (int64_t key = 0; key < count; key += 4) {
    take_two(std::true_type{}, keys + key, raw + max64(key - 4, 0));  // at first zeros, over which the next ones go
    take_two(std::false_type{}, keys + key + 2, raw);
  }
  totals.template run<0, totals.kSteps, true>(raw + count - 4);
}

// Queries at once, whose sums and totals fit into 32 registers: those of eight spill. More are cut into parts, none of
// which is less than the least.
constexpr int kLeastOverlapped = 4;
constexpr int kMostOverlapped = 7;
// Keys that all parts see before the next ones: 8 KiB in 16 bits, which stay in the first-level cache.
constexpr int64_t kKeysOverlapped = 32;

// Vectors of a row between whose products totals are taken; longer ones have twice as many, or a rest without.
template <class E>
constexpr int kOverlappedVectors = 4 * E::kWidth / E::Dot::kElements;

template <class E>
inline bool can_overlap(int64_t head_dim) {
  return head_dim % E::Dot::kElements == 0 && head_dim >= kOverlappedVectors<E> * E::Dot::kElements;
}

// dot_overlapped for `count` queries, kQueries or more.
template <class E, int kQueries = kLeastOverlapped, class... Args>
inline void dot_some_overlapped(int count, int64_t vectors, Args... args) {
  if constexpr (kQueries < kMostOverlapped) {
    if (count > kQueries) {
      dot_some_overlapped<E, kQueries + 1>(count, vectors, args...);
      return;
    }
  }
  constexpr int kVectors = kOverlappedVectors<E>;
  (vectors == 2 * kVectors ? dot_overlapped<E, kQueries, 2 * kVectors, true>
   : vectors == kVectors   ? dot_overlapped<E, kQueries, kVectors, true>
                           : dot_overlapped<E, kQueries, kVectors, false>)(args...);
}

}  // namespace
}  // namespace fastattn
