// The first product of Method::rows: rows of queries dotted with rows of keys. Memory decides its speed, and what the
// CPU fetches ahead by itself decides that of memory: it follows rows as long as their lines are read in the order in
// which they stand, by loads that few others come between. So queries stay in registers and a key is multiplied by as
// many as those hold; for the rest the keys are read again, some at a time, from the first-level cache.
// (docs/decisions/0016)
#pragma once

#include "algorithm/decoded_rows.h"
#include "algorithm/overlapped_dots.h"

namespace fastattn {
namespace {

// Splits `rows` into as few parts of at most `most` as there can be, sizes that differ by one.
inline int part_of(int rows, int most) {
  const int parts = (rows + most - 1) / most;
  return (rows + parts - 1) / parts;
}

// Queries that registers hold, of so many vectors each; none of longer ones.
template <class E>
constexpr int queries_held(int vectors) {
  return E::V::kSums < 16 || vectors > 8 ? 0 : vectors > 4 ? 3 : 4;
}

// Keys that all of a panel's queries see before the next ones, where that takes more than one pass: 4 KiB or less, so
// that what the first reads is still on its way while others multiply what was read before. In float32 twice as many
// took groups of seven 0.87 to 0.80 of what there is to read.
constexpr int64_t keys_of_passes(int64_t bytes) { return bytes > 256 ? 8 : 16; }
// How far ahead a second pass asks for keys.
constexpr int64_t kKeysAgain = 32;

// raw[query][key] for kQueries rows of queries, `query_stride` lanes apart, and `count` keys, whole groups of sixteen
// sums; raw's rows are kBlockKeys long. Each sum has lanes of its own, so it does not depend on who is computed beside
// it. A row has up to kVectors vectors; kAdjacent: all of them, and rows lie one behind the other, so that one register
// addresses all. kAgain: the keys have just been read, so memory is idle, and has those that come kKeysAgain later
// brought near; into the first-level cache they would push out what is still to be read. `ahead`: how far ahead rows
// are asked for that the CPU does not foresee, or 0.
template <class E, int kQueries, int kVectors, bool kAdjacent, bool kAgain>
FASTATTN_NOINLINE void dot_held(typename E::Scalar* raw, const char* const* keys, int64_t count,
                                const typename E::Scalar* query, int64_t head_dim, int64_t query_stride,
                                int64_t ahead) {
  using V = typename E::V;
  using Dot = typename E::Dot;
  using Read = typename E::Read;
  using Reg = typename E::Reg;
  constexpr int kSums = V::kSums;
  constexpr int kKeys = kSums / (kQueries > 2 ? 4 : kQueries);
  Reg lanes[kQueries][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      lanes[q][v] = v * Dot::kElements < head_dim ? V::load(query + q * query_stride + v * E::kWidth) : V::zero();
    }
  }
  // Rows are known before their turn: loads that wait for an address are passed by others.
  const char* next[4] = {keys[0], keys[1], keys[2], keys[3]};
  constexpr int64_t kRowBytes = int64_t{kVectors} * Dot::kElements * sizeof(Read);
  const char* adjacent = keys[0];
  for (int64_t key = 0; key < count; key += kKeys) {
    Reg sums[kSums];
    Reg quarters[4];
#pragma GCC unroll 16
    for (int i = kQueries * kKeys; i < kSums; ++i) {
      sums[i] = V::zero();
    }
    const char* rows[4];
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) {
      if (!kAdjacent && k % 4 == 0) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          rows[r] = next[r];
          next[r] = keys[key + k + 4 + r];
        }
      }
      if (!kAdjacent && ahead > 0) {
        prefetch_row(keys[key + k + ahead], head_dim * static_cast<int64_t>(sizeof(Read)));
      }
      const auto* row = reinterpret_cast<const Read*>(kAdjacent ? adjacent + k * kRowBytes : rows[k % 4]);
      Reg sum[kQueries];
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
        sum[q] = V::zero();
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t d = v * Dot::kElements;
        FASTATTN_KEEP_ORDER();
        if constexpr (kAgain) {
          __builtin_prefetch(adjacent + (k + kKeysAgain) * kRowBytes + d * int64_t{sizeof(Read)}, 0, 1);
        }
        const Reg x = kAdjacent || v < kVectors - 2
                          ? Dot::load(row + d)
                          : Dot::load_partial(row + d, static_cast<int>(clamp64(head_dim - d, 0, Dot::kElements)));
#pragma GCC unroll 4
        for (int q = 0; q < kQueries; ++q) {
          sum[q] = Dot::run(x, lanes[q][v], sum[q]);
        }
      }
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
        sums[q * kKeys + k] = sum[q];
      }
      if (k >= kKeys - 4) {
        const int i = k - (kKeys - 4);
        quarters[i] = Dot::Sums::sum_quarters(sums[i], sums[i + 4], sums[i + 8], sums[i + 12]);
      }
    }
    const Reg totals = Dot::Sums::sum_within_quarters(quarters);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      V::template store_part<kKeys>(raw + q * E::kBlockKeys + key, totals, q);
    }
    adjacent += kKeys * kRowBytes;
  }
}

// The same for one tile of keys and queries that are read as often as they are needed. kFetch: keys are asked for.
template <class E, int kKeyRows, int kQueries, bool kFetch>
FASTATTN_INLINE void dot_rows(typename E::Scalar* raw, const char* const* keys, const typename E::Scalar* query,
                              int64_t head_dim, int64_t query_stride) {
  using V = typename E::V;
  using Dot = typename E::Dot;
  using Read = typename E::Read;
  typename E::Reg sum[kQueries * kKeyRows];
#pragma GCC unroll 32
  for (int i = 0; i < kQueries * kKeyRows; ++i) {
    sum[i] = V::zero();
  }
  const Read* rows[kKeyRows];
#pragma GCC unroll 8
  for (int r = 0; r < kKeyRows; ++r) {
    rows[r] = reinterpret_cast<const Read*>(keys[r]);
  }
  int64_t d = 0;
  const auto multiply = [&](const auto& load) FASTATTN_LAMBDA_INLINE {
    typename E::Reg x[kKeyRows];
#pragma GCC unroll 8
    for (int r = 0; r < kKeyRows; ++r) {
      x[r] = load(rows[r]);
      if constexpr (kQueries == 1) {  // at once: sixteen registers hold no tile of keys beside its sums
        sum[r] = Dot::run(x[r], V::load(query), sum[r]);
      }
      // One line for each that is read: in bursts they wait for each other, and so do the loads behind them.
      if (kFetch && d * int64_t{sizeof(Read)} % kLine == 0) {
        __builtin_prefetch(keys[r + kRowsAhead<E>] + d * int64_t{sizeof(Read)}, 0, 2);
      }
    }
#pragma GCC unroll 8
    for (int q = 0; kQueries > 1 && q < kQueries; ++q) {
      const auto lanes = V::load(query + q * query_stride);
#pragma GCC unroll 8
      for (int r = 0; r < kKeyRows; ++r) {
        sum[q * kKeyRows + r] = Dot::run(x[r], lanes, sum[q * kKeyRows + r]);
      }
    }
  };
  for (; d + Dot::kElements <= head_dim; d += Dot::kElements, query += E::kWidth) {
    multiply([&](const Read* row) FASTATTN_LAMBDA_INLINE { return Dot::load(row + d); });
  }
  if (d < head_dim) {
    const int rest = static_cast<int>(head_dim - d);
    multiply([&](const Read* row) FASTATTN_LAMBDA_INLINE { return Dot::load_partial(row + d, rest); });
  }
  constexpr int kTogether = kQueries * kKeyRows <= 8 ? 8 : V::kSums;
  constexpr int kPer = kTogether / kKeyRows;  // queries whose sums are totalled together
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; q += kPer) {
    typename E::Reg some[kTogether];
#pragma GCC unroll 16
    for (int i = 0; i < kTogether; ++i) {
      some[i] = q * kKeyRows + i < kQueries * kKeyRows ? sum[q * kKeyRows + i] : V::zero();
    }
    alignas(64) typename E::Scalar totals[kTogether];
    Dot::Sums::sum_lanes(some, totals);
    for (int i = 0; i < kPer && q + i < kQueries; ++i) {
      for (int r = 0; r < kKeyRows; ++r) {
        raw[(q + i) * E::kBlockKeys + r] = totals[i * kKeyRows + r];
      }
    }
  }
}

// Scores of kQueries rows by a tile of kKeys keys.
template <class E, int kQueries, bool kFetch>
FASTATTN_NOINLINE void dot_tile(typename E::Scalar* raw, const char* const* keys, const typename E::Scalar* query,
                                int64_t head_dim, int64_t query_stride) {
  // One query has sums enough with eight keys; more share four, which they find in registers.
  constexpr int kKeyRows = kQueries == 1 ? 8 : 4;
  for (int key = 0; key < E::kKeys; key += kKeyRows) {
    dot_rows<E, kKeyRows, kQueries, kFetch>(raw + key, keys + key, query, head_dim, query_stride);
  }
}

// dot_tile for `count` queries, one of kQueries and more.
template <class E, bool kFetch, int kQueries = 1>
inline void dot_queries(int count, typename E::Scalar* raw, const char* const* keys, const typename E::Scalar* query,
                        int64_t head_dim, int64_t query_stride) {
  if (kQueries == E::kQueryRows || count == kQueries) {
    dot_tile<E, kQueries, kFetch>(raw, keys, query, head_dim, query_stride);
  } else if constexpr (kQueries < E::kQueryRows) {
    dot_queries<E, kFetch, kQueries + 1>(count, raw, keys, query, head_dim, query_stride);
  }
}

// dot_held for `count` queries of `vectors` vectors, kQueries and kVectors and more.
template <class E, int kQueries = 1, int kVectors = 2, class... Args>
inline void dot_some_held(int count, int64_t vectors, bool adjacent, bool again, Args... args) {
  if constexpr (kQueries == 1 && kVectors < 8) {
    if (vectors > kVectors) {
      dot_some_held<E, kQueries, kVectors + 2>(count, vectors, adjacent, again, args...);
      return;
    }
  }
  if constexpr (kQueries < queries_held<E>(kVectors)) {
    if (count > kQueries) {
      dot_some_held<E, kQueries + 1, kVectors>(count, vectors, adjacent, again, args...);
      return;
    }
  }
  const auto dot = !adjacent ? dot_held<E, kQueries, kVectors, false, false>
                   : again   ? dot_held<E, kQueries, kVectors, true, true>
                             : dot_held<E, kQueries, kVectors, true, false>;
  dot(args...);
}

// Whether sums are totalled while the next keys are multiplied: where keys are widened, or multiplied in pairs, totals
// take as long as a third of the products and more.
template <class E>
constexpr bool kOverlaps =
    E::V::kSums == 16 && (E::Dot::kElements > E::kWidth || sizeof(typename E::Read) < sizeof(typename E::Scalar));

// raw[lane][key ...] for all rows of the panel and keys [begin, end) of the block, whole tiles of kKeys.
// `adjacent`: see KeyValueView.
template <class E>
inline void multiply_rows(typename E::Scalar* raw, const Panel<E>& panel, const char* const* keys, int64_t begin,
                          int64_t end, int64_t head_dim, bool adjacent) {
  using Dot = typename E::Dot;
  constexpr auto kSize = static_cast<int64_t>(sizeof(typename E::Read));
  static_assert(E::kKeys == 8);
  const int64_t stride = query_lanes<E>(head_dim);
  if constexpr (E::V::kSums == 16) {
    const int64_t vectors = stride / E::kWidth;
    // Passes from which on they cost more than they save: where keys are widened, a second one does.
    constexpr bool kPairs = Dot::kElements > E::kWidth;
    constexpr bool kWidens = !kPairs && kSize < static_cast<int64_t>(sizeof(typename E::Scalar));
    constexpr int kPasses = kWidens ? 1 : kPairs ? 2 : 3;
    const int held = queries_held<E>(static_cast<int>(vectors));
    // Words gain with four queries too; bfloat16 reads 0.84 of what there is so, and 0.88 with all four held. Eight
    // held in two passes are better than two parts.
    const bool overlaps = kOverlaps<E> && panel.live >= kLeastOverlapped && (Dot::kWords || panel.live > held) &&
                          can_overlap<E>(head_dim);
    if (panel.live <= kPasses * held && !(overlaps && panel.live <= kMostOverlapped)) {
      const int64_t step = panel.live > held ? keys_of_passes(head_dim * kSize) : kMostRowsAtOnce;
      each_tile(round_down(begin, 16), round_up(end, 16), step, [&](int64_t key, int64_t count) {
        const bool follow = lie_adjacent(adjacent, keys + key, count, head_dim * kSize);
        const bool fixed = follow && round_up(vectors, 2) * Dot::kElements == head_dim;
        for (int lane = 0, pass = 0; lane < panel.live; ++pass) {
          const int some = part_of(panel.live - lane, held);
          const bool again = kPairs && pass == 1 && key + kKeysAgain < end;
          dot_some_held<E>(some, vectors, fixed, again, raw + lane * E::kBlockKeys + key, keys + key, count,
                           panel.query + lane * stride, head_dim, stride,
                           !follow && lane == 0 && !E::kDecodes ? kRowsAhead<E> : 0);
          lane += some;
        }
      });
      return;
    }
    if constexpr (kOverlaps<E>) {
      if (overlaps) {
        const int64_t step = panel.live > kMostOverlapped ? kKeysOverlapped : kMostRowsAtOnce;
        each_tile(round_down(begin, 16), round_up(end, 16), step, [&](int64_t key, int64_t count) {
          for (int lane = 0; lane < panel.live;) {
            const int some = part_of(panel.live - lane, kMostOverlapped);
            dot_some_overlapped<E>(some, vectors, raw + lane * E::kBlockKeys + key, keys + key, count,
                                   panel.query + lane * stride, head_dim, stride,
                                   lane == 0 && !E::kDecodes ? kRowsAhead<E> : 0);
            lane += some;
          }
        });
        return;
      }
    }
  }
  for (int64_t key = begin; key < end; key += E::kKeys) {
    for (int lane = 0; lane < panel.live;) {
      const int count = part_of(panel.live - lane, E::kQueryRows);
      const auto dot = lane == 0 && !E::kDecodes ? dot_queries<E, true> : dot_queries<E, false>;
      dot(count, raw + lane * E::kBlockKeys + key, keys + key, panel.query + lane * stride, head_dim, stride);
      lane += count;
    }
  }
}

// The same of rows as they are stored.
template <class E>
inline void multiply_stored_rows(typename E::Scalar* raw, const Panel<E>& panel, const KeyValueView& view,
                                 int64_t begin, int64_t end, int64_t head_dim) {
  if constexpr (E::kDecodes) {
    DecodedRows<E> decoded(view.stored, head_dim);
    each_tile(round_down(begin, 16), round_up(end, 16), decoded.most(), [&](int64_t key, int64_t count) {
      const char* const* rows = decoded.decode(view.key_rows + key, count);
      multiply_rows<E>(raw + key, panel, rows, 0, count, head_dim, true);
    });
  } else {
    multiply_rows<E>(raw, panel, view.key_rows, begin, end, head_dim, view.keys_adjacent);
  }
}

}  // namespace
}  // namespace fastattn
