// The second product of rows of queries by instructions that multiply pairs of 16-bit numbers: two keys share a lane.
// Probabilities are rounded to 16 bits once, values of two keys are interleaved as they are read.
#pragma once

#include <type_traits>
#include <utility>

#include "algorithm/panel.h"
#include "algorithm/row_dots.h"
#include "isa/avx512/vec.h"

namespace fastattn {
namespace {

constexpr int kPieceColumns = 32;  // whose pairs are two vectors

// The first `count` of 32 numbers.
FASTATTN_INLINE __mmask32 first(int count) { return static_cast<__mmask32>((uint64_t{1} << count) - 1); }

// A row's probabilities of two keys, as a product broadcasts them: see VecF32::fma_from.
using ProbPair = const uint16_t (&)[2];

// Where a product of rows of probabilities and columns of values stands.
struct PairedBlock {
  const uint16_t* probs;  // [row][kBlockKeys]
  const float* scales;    // of the rows
  const char* const* values;
  int64_t begin;  // keys [begin, end), counted in the block; `begin` is even
  int64_t end;
  int64_t tile;  // keys whose sums go to the output together
  float* output;
  int64_t output_stride;
  int64_t at;       // the first column
  int columns;      // of the last piece, that are there
  int64_t fetched;  // rows of values before this began, which it brings back to kRowsAhead; 0: it asks for none
};

// f of every number of the sequence, each a type of its own.
template <int... kNumbers, class F>
FASTATTN_INLINE void each_constant(std::integer_sequence<int, kNumbers...> /*numbers*/, const F& f) {
  (f(std::integral_constant<int, kNumbers>{}), ...);
}

// Adds kRows rows by kPieces pieces of columns to the output. Pairs says how two rows of values become pairs of keys,
// and how those are multiplied and added.
// kAdjacent: the columns are all there are, and rows lie one behind the other.
template <class E, class Pairs, int kRows, int kPieces, bool kAdjacent>
FASTATTN_NOINLINE void add_pairs(const PairedBlock& block) {
  using Read = typename E::Read;
  using Operands = typename Pairs::Reg[2];
  const __mmask32 last = first(block.columns);
  typename Pairs::Reg sum[kRows][2 * kPieces];
  constexpr int64_t kColumns = int64_t{kPieces} * kPieceColumns;
  const uint16_t* const words = block.probs;
  const char* const* const values = block.values;
  const int64_t at = block.at;
  const char* adjacent = block.values[block.begin];
  // A key without a second: the row is its own, to be passed over.
  const auto multiply = [&](int64_t key, int64_t second, bool single) FASTATTN_LAMBDA_INLINE {
    const auto* even = reinterpret_cast<const Read*>(kAdjacent ? adjacent : values[key]) + (kAdjacent ? 0 : at);
    const auto* odd = kAdjacent ? even + (single ? 0 : kColumns) : reinterpret_cast<const Read*>(values[second]) + at;
    // Where there are registers, a row's lines one after another: then the CPU fetches what follows.
    constexpr bool kInOrder = kRows < 6;
    // Each broadcasts its own probability; the registers that this saves are those that widening takes.
    constexpr bool kInProduct = kRows > (Pairs::kWidens ? 1 : 3);
    constexpr bool kKeep = !kInProduct && kRows < 3;  // probabilities
    typename Pairs::Row first[kPieces];
    __m512i probs[kRows];
    const auto load_probs = [&](int r) FASTATTN_LAMBDA_INLINE {
      probs[r] = _mm512_broadcastd_epi32(_mm_loadu_si32(words + r * E::kBlockKeys + key));
      FASTATTN_KEEP_ORDER();  // nor is it loaded for each product anew
    };
#pragma GCC unroll 8
    for (int r = 0; kKeep && r < kRows; ++r) {
      load_probs(r);
    }
#pragma GCC unroll 4
    for (int piece = 0; kInOrder && piece < kPieces; ++piece) {
      first[piece] = Pairs::load(even + piece * kPieceColumns, piece == kPieces - 1 ? last : ~0U);
      FASTATTN_KEEP_ORDER();
    }
#pragma GCC unroll 4
    for (int piece = 0; piece < kPieces; ++piece) {
      const __mmask32 mask = piece == kPieces - 1 ? last : ~0U;
      if constexpr (!kInOrder) {
        FASTATTN_KEEP_ORDER();
        first[piece] = Pairs::load(even + piece * kPieceColumns, mask);
      }
      Operands pairs;
      Pairs::interleave(first[piece], Pairs::load(odd + piece * kPieceColumns, single ? 0 : mask), pairs);
      FASTATTN_KEEP_ORDER();
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        if (!kKeep && !kInProduct) {
          load_probs(r);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          typename Pairs::Reg& to = sum[r][2 * piece + i];
          if constexpr (kInProduct) {
            to = Pairs::run(pairs[i], reinterpret_cast<ProbPair>(words[r * E::kBlockKeys + key]), to);
          } else {
            to = Pairs::run(pairs[i], probs[r], to);
          }
        }
      }
    }
  };
  for (int64_t key = block.begin; key < block.end;) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < 2 * kPieces; ++i) {
        sum[r][i] = Pairs::zero();
      }
    }
    const int64_t end = min64(block.end, (key / block.tile + 1) * block.tile);
    for (; key + 1 < end; key += 2, adjacent += 2 * kColumns * sizeof(Read)) {
      if (!kAdjacent && block.fetched > 0) {
        constexpr int64_t kBytes = kColumns * sizeof(Read);
        const int64_t from = at * static_cast<int64_t>(sizeof(Read));
        const int64_t ahead = key + block.fetched - key * (block.fetched - kRowsAhead<E>) / E::kBlockKeys;
        prefetch_row(values[ahead] + from, kBytes);
        prefetch_row(values[ahead + 1] + from, kBytes);
      }
      multiply(key, key + 1, false);
    }
    if (key < end) {
      multiply(key, key, true);
      ++key;
    }
    // Numbers that are constants: of a loop so long gcc unrolls nothing, and the sums then stand in memory.
    each_constant(std::make_integer_sequence<int, kRows>{}, [&](auto row) FASTATTN_LAMBDA_INLINE {
      constexpr int r = decltype(row)::value;
      float* to = block.output + r * block.output_stride;
#pragma GCC unroll 4
      for (int piece = 0; piece < kPieces; ++piece, to += kPieceColumns) {
        Operands columns = {sum[r][2 * piece], sum[r][2 * piece + 1]};
        Pairs::order(columns);
        Pairs::add_to(to, columns[0], block.scales[r]);
        if (piece < kPieces - 1 || block.columns > E::kWidth) {
          Pairs::add_to(to + E::kWidth, columns[1], block.scales[r]);
        }
      }
    });
  }
}

// Rows that share a pair of values once it is read: as many as there are registers for their sums.
template <int kPieces>
constexpr int kPairRows = kPieces == 4 ? 3 : 7;

// add_pairs for `count` rows, one of kRows and more.
template <class E, class Pairs, int kPieces, bool kAdjacent, int kRows = 1>
void add_some_pairs(int count, const PairedBlock& block) {
  if (kRows == kPairRows<kPieces> || count == kRows) {
    add_pairs<E, Pairs, kRows, kPieces, kAdjacent>(block);
  } else if constexpr (kRows < kPairRows<kPieces>) {
    add_some_pairs<E, Pairs, kPieces, kAdjacent, kRows + 1>(count, block);
  }
}

// As add_value_rows does, with `words` and `scales` in place of probabilities, [lane][kBlockKeys].
template <class E, class Pairs>
void add_paired_values(const Panel<E>& panel, const uint16_t* words, const float* scales, const char* const* values,
                       int64_t begin, int64_t end, int64_t value_dim, int64_t output_stride, bool adjacent) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(typename E::Read));
  // Many rows wait for arithmetic, which goes on from one tile into the next.
  const bool many = panel.live > 2 * kPairRows<4>;
  const int64_t step = rows_at_once<E>(value_dim);
  each_tile(begin, end, many ? E::kBlockKeys : step, [&](int64_t tile, int64_t keys) {
    const bool follow = lie_adjacent(adjacent, values + tile, keys, value_dim * kSize);
    for (int64_t at = 0; at < value_dim;) {
      const int64_t left = (value_dim - at + kPieceColumns - 1) / kPieceColumns;
      // Interleaving is work too, better shared by many rows.
      const bool shares = many || (panel.live > (Pairs::kWidens ? kPairRows<4> : 4) && panel.live <= kPairRows<1>);
      const int pieces = left >= 4 && !shares ? 4 : left >= 2 ? 2 : 1;
      const bool all = follow && pieces * kPieceColumns == value_dim;
      const auto add = pieces == 4   ? all ? add_some_pairs<E, Pairs, 4, true> : add_some_pairs<E, Pairs, 4, false>
                       : pieces == 2 ? all ? add_some_pairs<E, Pairs, 2, true> : add_some_pairs<E, Pairs, 2, false>
                                     : add_some_pairs<E, Pairs, 1, false>;
      const int64_t whole = (pieces - 1) * kPieceColumns;
      const auto columns = static_cast<int>(min64(kPieceColumns, value_dim - at - whole));
      for (int lane = 0; lane < panel.live;) {
        const int count = part_of(panel.live - lane, pieces == 4 ? kPairRows<4> : kPairRows<1>);
        const int64_t fetched = lane == 0 && !all && !(follow && pieces == 4) && !E::kDecodes
                                    ? kRowsAhead<E> + rows_of_softmax<E>(panel.live, value_dim * kSize)
                                    : 0;
        add(count, {words + lane * E::kBlockKeys, scales + lane, values, tile, tile + keys, step,
                    panel.output + lane * output_stride + at, output_stride, at, columns, fetched});
        lane += count;
      }
      at += whole + columns;
    }
  });
}

}  // namespace
}  // namespace fastattn
