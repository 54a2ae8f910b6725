// Rows of 8-bit floating-point numbers, looked up as bfloat16 in tables that registers hold (AVX512_VBMI).
#pragma once

#include "algorithm/row_engine.h"
#include "isa/avx512/vec.h"

namespace fastattn {
namespace {

class Float8Lookup {
 public:
  explicit Float8Lookup(const Float8Table& table)
      : low_{_mm512_load_si512(table.low), _mm512_load_si512(table.low + 64)},
        high_{_mm512_load_si512(table.high), _mm512_load_si512(table.high + 64)} {}

  // 64 numbers.
  FASTATTN_INLINE void write(__m512i codes, Bfloat16* out) const {
    // Bytes are interleaved within quarters of vectors: quarters of the first half and of the second, by turns.
    codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), codes);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i low = _mm512_permutex2var_epi8(low_[0], codes, low_[1]);
    const __m512i magnitude = _mm512_permutex2var_epi8(high_[0], codes, high_[1]);
    const __m512i high = _mm512_or_si512(magnitude, _mm512_and_si512(codes, sign));
    _mm512_storeu_si512(out, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi8(low, high));
  }

 private:
  __m512i low_[2];
  __m512i high_[2];
};

// How decoded rows are dotted.
template <class Dot>
struct LookupDot : Dot {
  static constexpr bool kLooksUp = true;

  // As decode_rows does.
  static FASTATTN_NOINLINE void look_up(const char* const* rows, int64_t count, int64_t columns, int64_t ahead,
                                        const Float8Table& table, Bfloat16* out) {
    const Float8Lookup lookup(table);
    const int64_t whole = round_down(columns, 64);
    const __mmask64 rest = (uint64_t{1} << (columns - whole)) - 1;
    for (int64_t i = 0; i < count; ++i, out += columns) {
      for (int64_t d = 0; d < whole; d += 64) {
        __builtin_prefetch(rows[i + ahead] + d, 0, 2);
        lookup.write(_mm512_loadu_si512(rows[i] + d), out + d);
      }
      if (rest != 0) {
        __builtin_prefetch(rows[i + ahead] + whole, 0, 2);
        lookup.write(_mm512_maskz_loadu_epi8(rest, rows[i] + whole), out + whole);
      }
    }
  }
};

}  // namespace
}  // namespace fastattn
