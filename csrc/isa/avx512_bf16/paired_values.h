// The second product of rows of queries by instructions that multiply pairs of 16-bit numbers: two keys share a lane.
// Probabilities are rounded to 16 bits once, values of two keys are interleaved as they are read.
#pragma once

#include "algorithm/panel.h"
#include "algorithm/row_products.h"
#include "isa/avx512/vec.h"

namespace fastattn {
namespace {

constexpr int kPieceColumns = 32;  // whose pairs are two vectors

// Where a product of rows of probabilities and columns of values stands.
struct PairedBlock {
  const uint16_t* probs;  // [row][kBlockKeys]
  const float* scales;    // of the rows
  const char* const* values;
  int64_t begin;  // keys [begin, end), counted in the block; `begin` is even
  int64_t end;
  float* output;
  int64_t output_stride;
  int64_t at;       // the first column
  int columns;      // of the last piece, that are there
  int64_t fetched;  // rows of values before this began, which it brings back to kRowsAhead; negative: it asks for none
};

// Adds kRows rows by kPieces pieces of columns to the output. Pairs says how two rows of values become pairs of keys,
// and how those are multiplied and added.
template <class E, class Pairs, int kRows, int kPieces>
FASTATTN_NOINLINE void add_pairs(const PairedBlock& block) {
  using Stored = typename E::Stored;
  using Operands = typename Pairs::Reg[2];
  const __mmask32 last = block.columns == kPieceColumns ? ~0U : (1U << block.columns) - 1U;
  typename Pairs::Reg sum[kRows][2 * kPieces];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kPieces; ++i) {
      sum[r][i] = Pairs::zero();
    }
  }
  // A key without a second: the row is its own, to be passed over.
  const auto multiply = [&](int64_t key, int64_t second, bool single) FASTATTN_LAMBDA_INLINE {
    const auto* even = reinterpret_cast<const Stored*>(block.values[key]) + block.at;
    const auto* odd = reinterpret_cast<const Stored*>(block.values[second]) + block.at;
    // Where there are registers, a row's lines one after another: then the CPU fetches what follows.
    constexpr bool kInOrder = kRows < 6;
    typename Pairs::Row first[kPieces];
#pragma GCC unroll 4
    for (int piece = 0; kInOrder && piece < kPieces; ++piece) {
      first[piece] = Pairs::load(even + piece * kPieceColumns, piece == kPieces - 1 ? last : ~0U);
    }
#pragma GCC unroll 4
    for (int piece = 0; piece < kPieces; ++piece) {
      const __mmask32 mask = piece == kPieces - 1 ? last : ~0U;
      if constexpr (!kInOrder) {
        __asm__ volatile("" ::: "memory");  // nor does a probability stay in one until the next piece
        first[piece] = Pairs::load(even + piece * kPieceColumns, mask);
      }
      Operands pairs;
      Pairs::interleave(first[piece], Pairs::load(odd + piece * kPieceColumns, single ? 0 : mask), pairs);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t two;
        memcpy(&two, block.probs + r * E::kBlockKeys + key, sizeof two);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          sum[r][2 * piece + i] = Pairs::run(pairs[i], _mm512_set1_epi32(two), sum[r][2 * piece + i]);
        }
      }
    }
  };
  int64_t key = block.begin;
  for (; key + 1 < block.end; key += 2) {
    if (kPieces < 4 && block.fetched >= 0) {
      constexpr int64_t kBytes = int64_t{kPieces} * kPieceColumns * sizeof(Stored);
      const int64_t from = block.at * static_cast<int64_t>(sizeof(Stored));
      const int64_t ahead = key + block.fetched - key * (block.fetched - kRowsAhead<E>) / E::kBlockKeys;
      prefetch_row(block.values[ahead] + from, kBytes);
      prefetch_row(block.values[ahead + 1] + from, kBytes);
    }
    multiply(key, key + 1, false);
  }
  if (key < block.end) {
    multiply(key, key, true);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
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
  }
}

// Rows that share a pair of values once it is read: as many as there are registers for their sums.
template <int kPieces>
constexpr int kPairRows = kPieces == 4 ? 3 : 7;

// add_pairs for `count` rows, one of kRows and more.
template <class E, class Pairs, int kPieces, int kRows = 1>
void add_some_pairs(int count, const PairedBlock& block) {
  if (kRows == kPairRows<kPieces> || count == kRows) {
    add_pairs<E, Pairs, kRows, kPieces>(block);
  } else if constexpr (kRows < kPairRows<kPieces>) {
    add_some_pairs<E, Pairs, kPieces, kRows + 1>(count, block);
  }
}

// As add_value_rows does, with `words` and `scales` in place of probabilities, [lane][kBlockKeys].
template <class E, class Pairs>
void add_paired_values(const Panel<E>& panel, const uint16_t* words, const float* scales, const char* const* values,
                       int64_t begin, int64_t end, int64_t value_dim, int64_t output_stride) {
  for (int64_t at = 0; at < value_dim;) {
    const int64_t left = (value_dim - at + kPieceColumns - 1) / kPieceColumns;
    const int pieces = left >= 4 && panel.live <= kPairRows<4> ? 4 : left >= 2 ? 2 : 1;
    const auto add = pieces == 4   ? add_some_pairs<E, Pairs, 4>
                     : pieces == 2 ? add_some_pairs<E, Pairs, 2>
                                   : add_some_pairs<E, Pairs, 1>;
    const int64_t whole = (pieces - 1) * kPieceColumns;
    const auto columns = static_cast<int>(min64(kPieceColumns, value_dim - at - whole));
    for (int lane = 0; lane < panel.live;) {
      const int count = part_of(panel.live - lane, pieces == 4 ? kPairRows<4> : kPairRows<1>);
      // Lines of a whole row follow one another, which the CPU fetches better unasked.
      const int64_t fetched = lane == 0 && pieces < 4 ? kRowsAhead<E> + rows_of_softmax<E>(panel.live) : -1;
      add(count, {words + lane * E::kBlockKeys, scales + lane, values, begin, end,
                  panel.output + lane * output_stride + at, output_stride, at, columns, fetched});
      lane += count;
    }
    at += whole + columns;
  }
}

}  // namespace
}  // namespace fastattn
