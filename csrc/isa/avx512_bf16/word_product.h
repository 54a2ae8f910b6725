// Products of int8 keys and values as 16-bit integers: queries and probabilities are rounded to steps of their row's
// largest, 2^-15 of it, far below the steps of what they meet, and sums are exact.
#pragma once

#include "algorithm/row_engine.h"
#include "algorithm/row_values.h"
#include "isa/avx512/vec.h"
#include "isa/avx512_bf16/paired_values.h"

namespace fastattn {
namespace {

// Of the words in a sum of so many products with bytes, which stays within 32 bits; and at most, of any.
constexpr float largest_word(int64_t products) { return static_cast<float>(min64(32767, INT32_MAX / 128 / products)); }

// What turns numbers of magnitude up to `largest` into words, and words back into them; without any, nothing.
struct WordScale {
  float to_words;
  float from_words;
  WordScale(float largest, int64_t products)
      : to_words(largest > 0 ? largest_word(products) / largest : 0),
        from_words(largest > 0 ? largest / largest_word(products) : 0) {}
};

// The largest magnitude of floats [0, count), a NaN or infinity among them if there is one.
FASTATTN_INLINE float largest_magnitude(const float* x, int64_t count) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 odd = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 y = VecF32::load_partial(x + i, static_cast<int>(min64(16, count - i)));
    largest = _mm512_max_ps(_mm512_abs_ps(y), largest);
    odd |= VecF32::unordered(_mm512_sub_ps(y, y));
  }
  return odd != 0 ? __builtin_nanf("") : _mm512_reduce_max_ps(largest);
}

FASTATTN_INLINE __m256i to_words(__m512 x, float scale) {
  return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(scale))));
}

// The same of probabilities, each rounded down after a part of a step that is its lane's. To nearest, a thousand keys
// of half a step beside a large one would all be lost, or doubled: 1.6% of the row.
FASTATTN_INLINE __m256i to_dithered_words(__m512 x, float scale) {
  const __m512 parts =
      _mm512_mul_ps(_mm512_set1_ps(0x1p-5F), _mm512_setr_ps(1, 17, 9, 25, 5, 21, 13, 29, 3, 19, 11, 27, 7, 23, 15, 31));
  const __m512 words = _mm512_fmadd_ps(x, _mm512_set1_ps(scale), parts);
  return _mm512_cvtsepi32_epi16(_mm512_cvt_roundps_epi32(words, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}

// Pairs of keys' bytes as pairs of words, and their exact sums.
struct WordPairs {
  using Reg = __m512i;
  using Row = __m256i;
  static constexpr bool kWidens = true;  // numbers, which makes interleaving dearer
  static FASTATTN_INLINE Reg zero() { return _mm512_setzero_si512(); }
  static FASTATTN_INLINE Row load(const Int8* row, __mmask32 mask) { return _mm256_maskz_loadu_epi8(mask, row); }
  static FASTATTN_INLINE void interleave(Row even, Row odd, Reg (&pairs)[2]) {
    pairs[0] = _mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(even, odd));
    pairs[1] = _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(even, odd));
  }
  static FASTATTN_INLINE Reg run(Reg pairs, Reg probs, Reg sum) { return _mm512_dpwssd_epi32(sum, pairs, probs); }
  static FASTATTN_INLINE Reg run(Reg pairs, ProbPair probs, Reg sum) {
    __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(pairs), "m"(probs));
    return sum;
  }
  // Columns 0..7 and 16..23, and the others, to the first sixteen and those after them.
  static FASTATTN_INLINE void order(Reg (&columns)[2]) {
    const Reg first = _mm512_shuffle_i64x2(columns[0], columns[1], 0x44);
    columns[1] = _mm512_shuffle_i64x2(columns[0], columns[1], 0xee);
    columns[0] = first;
  }
  static FASTATTN_INLINE void add_to(float* to, Reg sum, float scale) {
    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale), _mm512_loadu_ps(to)));
  }
};

// Integers in the lanes of floats.
struct WordLanes {
  static FASTATTN_INLINE __m512 add(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static FASTATTN_INLINE __m512 finish(__m512 sums) { return _mm512_cvtepi32_ps(_mm512_castps_si512(sums)); }
};

struct WordDot {
  using V = VecF32;
  using Sums = LaneSums<WordLanes>;
  using Prob = float;  // hardly less exact
  using Read = Int8;
  static constexpr int kElements = 32;
  static constexpr bool kScaleQuery = false;
  static constexpr bool kWords = true;
  static constexpr bool kPairsValues = true;
  static FASTATTN_INLINE __m512 load(const Int8* row) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
  }
  static FASTATTN_INLINE __m512 load_partial(const Int8* row, int count) {
    return widen(_mm256_maskz_loadu_epi8(first(count), row));
  }
  static FASTATTN_INLINE __m512 run(__m512 key, __m512 query, __m512 sum) {
    return _mm512_castsi512_ps(
        _mm512_dpwssd_epi32(_mm512_castps_si512(sum), _mm512_castps_si512(key), _mm512_castps_si512(query)));
  }

  // A row of queries as words, `lanes` of 32 bits; returns what they are to be multiplied by. Where a number is not
  // finite that is NaN.
  static float pack_query(const float* row, int64_t count, double sign, float* lanes) {
    const float largest = largest_magnitude(row, count);
    if (!(largest - largest == 0)) {
      memset(lanes, 0, static_cast<size_t>((count + 1) / 2) * sizeof *lanes);
      return largest - largest;
    }
    const WordScale scale(largest, count);
    auto* words = reinterpret_cast<int16_t*>(lanes);
    for (int64_t d = 0; d < round_up(count, kElements); d += 16) {
      const __m512 x = VecF32::load_partial(row + min64(d, count), static_cast<int>(clamp64(count - d, 0, 16)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + d),
                          to_words(x, sign < 0 ? -scale.to_words : scale.to_words));
    }
    return scale.from_words;
  }

  // As add_value_rows does.
  template <class E>
  static FASTATTN_NOINLINE void add_values(const Panel<E>& panel, const float* probs, const char* const* values,
                                           int64_t begin, int64_t end, int64_t value_dim, int64_t output_stride,
                                           bool adjacent) {
    alignas(64) uint16_t words[E::kLanes * E::kBlockKeys];
    float scales[E::kLanes];
    const int64_t from = round_down(begin, E::kWidth);
    const int64_t to = round_up(end, E::kWidth);
    for (int lane = 0; lane < panel.live; ++lane) {
      const float* row = probs + lane * E::kBlockKeys;
      const float largest = largest_magnitude(row + from, to - from);
      const WordScale scale(largest, kMostRowsAtOnce);
      scales[lane] = largest == largest ? scale.from_words : largest;  // NaN: so is the row
      for (int64_t key = from; key < to; key += E::kWidth) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(words + lane * E::kBlockKeys + key),
                           to_dithered_words(V::load(row + key), scale.to_words));
      }
    }
    add_paired_values<E, WordPairs>(panel, words, scales, values, begin, end, value_dim, output_stride, adjacent);
  }

 private:
  static FASTATTN_INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_cvtepi8_epi16(x)); }
};

}  // namespace
}  // namespace fastattn
