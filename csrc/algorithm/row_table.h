// Method::rows: where the rows of keys and values stand that a key block has. Each is read once, from wherever it lies,
// so pages cost nothing.
#pragma once

#include "algorithm/operands.h"
#include "algorithm/panel.h"

namespace fastattn {
namespace {

// Rows ahead of the one that is read: as many bytes of small ones.
template <class E>
constexpr int64_t kRowsAhead = sizeof(typename E::Stored) == 1 ? 2 * kPrefetchRows : kPrefetchRows;

// Rows of values, of so many bytes, that are asked for while scores become probabilities, which reads nothing else: a
// line for each vector.
template <class E>
inline int64_t rows_of_softmax(int live, int64_t bytes) {
  return min64(int64_t{live} * E::kBlockKeys / E::kWidth * kLine / bytes, 2 * kRowsAhead<E>);
}

// Where the rows of a key block stand, in the order in which they are read: what is a number of rows ahead is fetched,
// so after the values come the keys of the next block.
template <class E>
struct RowTable {
  const char* keys[E::kBlockKeys];
  const char* values[E::kBlockKeys];
  const char* next[kRowsAhead<E> + E::kKeys];
  // What multiplies rows that are quantised. A value's scale goes into its probability, unless it stands alone.
  alignas(64) float key_scales[E::kBlockKeys];
  alignas(64) float value_scales[E::kBlockKeys];
  bool odd_scales;  // some of the values' stand alone
};

// Lists rows [begin, begin + count) of a head; in place of those from `end` on, the last that exists.
inline void list_rows(const AttentionParams& p, const void* base, const int64_t* strides, int64_t size, int64_t batch,
                      int64_t head, int64_t begin, int64_t end, int64_t count, const char** rows) {
  const int64_t stop = min64(begin + count, end);
  const int64_t step = strides[2] * size;
  const char* row = nullptr;
  for (int64_t key = begin; key < stop;) {
    const int64_t run = p.block_table == nullptr ? stop - key : min64(stop - key, p.page_size - key % p.page_size);
    row = static_cast<const char*>(base) + row_index(p, strides, batch, head, key) * size;
    for (int64_t i = 0; i < run; ++i, row += step) {
      *rows++ = row;
    }
    key += run;
  }
  for (int64_t i = stop - begin; i < count; ++i) {
    *rows++ = row - step;
  }
}

// The same where they have been copied next to each other.
inline void list_copied_rows(const char* row, int64_t step, int64_t existing, int64_t count, const char** rows) {
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = row + min64(i, existing - 1) * step;
  }
}

// Lists the scales of the block's existing rows, [begin, end) of a head.
template <class E>
inline void list_scales(const AttentionParams& p, int64_t batch, int64_t head, int64_t begin, int64_t end,
                        RowTable<E>& table) {
  const auto list = [&](const float* scales, const int64_t* strides, float* out) {
    for (int64_t key = begin; key < end;) {
      const int64_t run = p.block_table == nullptr ? end - key : min64(end - key, p.page_size - key % p.page_size);
      const float* from = scales + row_index(p, strides, batch, head, key);
      if (strides[2] == 1) {
        memcpy(out + (key - begin), from, static_cast<size_t>(run) * sizeof *out);
      } else {
        for (int64_t i = 0; i < run; ++i) {
          out[key - begin + i] = from[i * strides[2]];
        }
      }
      key += run;
    }
  };
  list(p.key_scales, p.key_scale_strides, table.key_scales);
  list(p.value_scales, p.value_scale_strides, table.value_scales);
  uint32_t odd = 0;  // a number, of which compilers make vectors
  for (int64_t i = 0; i < end - begin; ++i) {
    const float scale = table.value_scales[i];
    const bool is_odd = stands_alone(scale);
    odd |= static_cast<uint32_t>(is_odd);
    table.value_scales[i] = is_odd ? 1 : scale;
    // An infinite one would hide the key where its product is negative.
    table.key_scales[i] += table.key_scales[i] - table.key_scales[i];
  }
  table.odd_scales = odd != 0;
  for (int64_t i = end - begin; i < E::kBlockKeys; ++i) {
    table.key_scales[i] = table.value_scales[i] = 1;
  }
}

// Bytes of a page from which on its rows count as adjacent ones: what the CPU fetches ahead by itself starts anew with
// each page. 9 heads on 3 of D64 in bfloat16 read 0.70 of what there is in pages of 16 KiB, 0.82 in 32, 0.85 in 64 and
// 0.92 in 128, where rows that are asked for give 0.86 to 0.88; in float32 0.89, 0.96 and 1.0 from 32 on, against 0.90.
constexpr int64_t kAdjacentBytes = 65536;

// Rows of so many columns that are read more than once before the next ones are: they stay in the first-level cache,
// and what was fetched ahead meanwhile is still on its way. In float32 eight of 512 bytes read 0.90 of what there is in
// groups of seven, sixteen 0.87, 32 a tenth less. Where values are worked upon before they are multiplied, or a row's
// columns are gone through in parts, sums are kept for more of them.
constexpr int64_t kMostRowsAtOnce = 256;
constexpr int64_t kLeastRowsAtOnce = 16;
template <class E>
constexpr int64_t rows_at_once(int64_t columns) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(typename E::Read));
  const bool few = kSize == sizeof(typename E::Scalar) && columns <= 8 * E::kWidth;
  const int64_t least = few ? 8 : kLeastRowsAtOnce;
  return clamp64(round_down((few ? 4096 : 8192) / (columns * kSize), least), least, kMostRowsAtOnce);
}

// Whether rows [0, count) of a tile, of so many bytes, lie one behind the other, if those of a page do: a tile is in
// two pages at most, and where no rows are left, the last repeats.
inline bool lie_adjacent(bool adjacent, const char* const* rows, int64_t count, int64_t bytes) {
  return adjacent && rows[count - 1] - rows[0] == (count - 1) * bytes &&
         (count == 1 || rows[count - 1] - rows[count - 2] == bytes);
}

// Calls do_tile(first, count) for rows [begin, end) of the block by so many. Tiles start where the block's do: sums
// over them do not depend on which of its rows somebody sees.
template <class DoTile>
FASTATTN_INLINE void each_tile(int64_t begin, int64_t end, int64_t step, const DoTile& do_tile) {
  for (int64_t tile = begin / step * step; tile < end; tile += step) {
    const int64_t first = max64(begin, tile);
    do_tile(first, min64(end, tile + step) - first);
  }
}

}  // namespace
}  // namespace fastattn
