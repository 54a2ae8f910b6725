// Products of int8 keys and values as 16-bit integers: queries and probabilities are rounded to steps of their row's
// largest, 2^-15 of it, far below the steps of what they meet, and sums are exact.
#pragma once

#include "algorithm/row_engine.h"
#include "algorithm/row_products.h"
#include "isa/avx512/vec.h"

namespace fastattn {
namespace {

constexpr float kLargestWord = 32767;

// What turns numbers of magnitude up to `largest` into words, and words back into them; without any, nothing.
struct WordScale {
  float to_words;
  float from_words;
  explicit WordScale(float largest)
      : to_words(largest > 0 ? kLargestWord / largest : 0), from_words(largest > 0 ? largest / kLargestWord : 0) {}
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

struct WordDot {
  using V = VecF32;
  static constexpr int kElements = 32;
  static constexpr bool kScaleQuery = false;
  static constexpr bool kWords = true;
  static FASTATTN_INLINE __m512 load(const Int8* row) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
  }
  static FASTATTN_INLINE __m512 load_partial(const Int8* row, int count) {
    return widen(_mm256_maskz_loadu_epi8((1U << count) - 1U, row));
  }
  static FASTATTN_INLINE __m512 run(__m512 key, __m512 query, __m512 sum) {
    return _mm512_castsi512_ps(
        _mm512_dpwssd_epi32(_mm512_castps_si512(sum), _mm512_castps_si512(key), _mm512_castps_si512(query)));
  }
  static FASTATTN_INLINE __m512 total(__m512 sum) { return _mm512_cvtepi32_ps(_mm512_castps_si512(sum)); }

  // A row of queries as words, `lanes` of 32 bits; returns what they are to be multiplied by. Where a number is not
  // finite that is NaN.
  static float pack_query(const float* row, int64_t count, double sign, float* lanes) {
    const float largest = largest_magnitude(row, count);
    if (!(largest - largest == 0)) {
      memset(lanes, 0, static_cast<size_t>((count + 1) / 2) * sizeof *lanes);
      return largest - largest;
    }
    const WordScale scale(largest);
    auto* words = reinterpret_cast<int16_t*>(lanes);
    for (int64_t d = 0; d < round_up(count, kElements); d += 16) {
      const __m512 x = VecF32::load_partial(row + min64(d, count), static_cast<int>(clamp64(count - d, 0, 16)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + d),
                          to_words(x, sign < 0 ? -scale.to_words : scale.to_words));
    }
    return scale.from_words;
  }

  // Adds kRows rows of probabilities, as words [row][kBlockKeys], by kPieces times 32 columns of values from `at` on to
  // the output; of the last piece `columns` are there.
  template <class E, int kRows, int kPieces>
  static FASTATTN_NOINLINE void add_columns(const int16_t* words, const float* scales, const char* const* values,
                                            int64_t at, int64_t keys, float* output, int64_t output_stride, int columns,
                                            bool fetch) {
    __m512i sum[kRows][2 * kPieces];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kPieces; ++i) {
        sum[r][i] = _mm512_setzero_si512();
      }
    }
    const __mmask32 last = columns == kElements ? ~0U : (1U << columns) - 1U;
    for (int64_t key = 0; key < keys; key += 2) {
      if (fetch) {
        __builtin_prefetch(values[key + kRowsAhead<E>] + at, 0, 2);
        __builtin_prefetch(values[key + 1 + kRowsAhead<E>] + at, 0, 2);
      }
      __m512i pairs[2 * kPieces];
#pragma GCC unroll 2
      for (int i = 0; i < kPieces; ++i) {
        const __mmask32 mask = i == kPieces - 1 ? last : ~0U;
        const __m256i even = _mm256_maskz_loadu_epi8(mask, values[key] + at + i * kElements);
        const __m256i odd = _mm256_maskz_loadu_epi8(mask, values[key + 1] + at + i * kElements);
        // Columns 0..7 and 16..23, pairs of keys; and the others.
        pairs[2 * i] = _mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(even, odd));
        pairs[2 * i + 1] = _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(even, odd));
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t two;
        memcpy(&two, words + r * E::kBlockKeys + key, sizeof two);
        const __m512i probs = _mm512_set1_epi32(two);
#pragma GCC unroll 4
        for (int i = 0; i < 2 * kPieces; ++i) {
          sum[r][i] = _mm512_dpwssd_epi32(sum[r][i], pairs[i], probs);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < kPieces; ++i) {
        const __m512i first = _mm512_shuffle_i64x2(sum[r][2 * i], sum[r][2 * i + 1], 0x44);
        const __m512i second = _mm512_shuffle_i64x2(sum[r][2 * i], sum[r][2 * i + 1], 0xee);
        const __m512 scale = _mm512_set1_ps(scales[r]);
        float* to = output + r * output_stride + i * kElements;
        V::store(to, V::fma(_mm512_cvtepi32_ps(first), scale, V::load(to)));
        if (i < kPieces - 1 || columns > V::kWidth) {
          V::store(to + V::kWidth, V::fma(_mm512_cvtepi32_ps(second), scale, V::load(to + V::kWidth)));
        }
      }
    }
  }

  template <class E, int kPieces, int kRows = 1>
  static void add_some_rows(int count, const int16_t* words, const float* scales, const char* const* values, int64_t at,
                            int64_t keys, float* output, int64_t output_stride, int columns, bool fetch) {
    if (kRows == E::kValueRows || count == kRows) {
      add_columns<E, kRows, kPieces>(words, scales, values, at, keys, output, output_stride, columns, fetch);
    } else if constexpr (kRows < E::kValueRows) {
      add_some_rows<E, kPieces, kRows + 1>(count, words, scales, values, at, keys, output, output_stride, columns,
                                           fetch);
    }
  }

  // As add_value_rows does. `begin` is even, and probabilities from `end` on are 0 as far as whole vectors go.
  template <class E>
  static void add_values(const Panel<E>& panel, const float* probs, const char* const* values, int64_t begin,
                         int64_t end, int64_t value_dim, int64_t output_stride) {
    static_assert(int64_t{E::kBlockKeys} * 127 * 32767 < INT32_MAX, "sums over a block stay within 32 bits");
    alignas(64) int16_t words[E::kLanes * E::kBlockKeys];
    float scales[E::kLanes];
    const int64_t from = round_down(begin, E::kWidth);
    const int64_t to = round_up(end, E::kWidth);
    for (int lane = 0; lane < panel.live; ++lane) {
      const float* row = probs + lane * E::kBlockKeys;
      const float largest = largest_magnitude(row + from, to - from);
      const WordScale scale(largest);
      scales[lane] = largest == largest ? scale.from_words : largest;  // NaN: so is the row
      for (int64_t key = from; key < to; key += E::kWidth) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(words + lane * E::kBlockKeys + key),
                           to_words(V::load(row + key), scale.to_words));
      }
    }
    for (int64_t at = 0; at < value_dim;) {
      const int64_t rest = value_dim - at;
      const bool two = rest > kElements;
      const int64_t taken = min64(rest, 2 * kElements);
      for (int lane = 0; lane < panel.live;) {
        const int count = part_of(panel.live - lane, E::kValueRows);
        (two ? add_some_rows<E, 2> : add_some_rows<E, 1>)(count, words + lane * E::kBlockKeys + begin, scales + lane,
                                                          values + begin, at, end - begin,
                                                          panel.output + lane * output_stride + at, output_stride,
                                                          static_cast<int>(two ? taken - kElements : taken), lane == 0);
        lane += count;
      }
      at += taken;
    }
  }

 private:
  static FASTATTN_INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_cvtepi8_epi16(x)); }
};

// How quantised keys are multiplied by a CPU that has VPDPWSSD.
template <class Stored>
struct ByteDot : WideDot<VecF32, Stored> {};
template <>
struct ByteDot<Int8> : WordDot {};

}  // namespace
}  // namespace fastattn
