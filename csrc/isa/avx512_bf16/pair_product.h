// Products of bfloat16 pairs.
#pragma once

#include "algorithm/engine.h"
#include "isa/avx512/vec.h"
#include "isa/avx512_bf16/paired_values.h"

namespace fastattn {
namespace {

// Sixteen numbers of the even key, then sixteen of the odd one, to lanes that pair them, the even one in the low half.
FASTATTN_INLINE __m512 pair_halves(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves));
}

// sum += a.even * b.even + a.odd * b.odd in every 32-bit lane.
struct Bf16PairProduct {
  using V = VecF32;
  using Element = Bfloat16;
  using Prob = Bfloat16;
  static constexpr int kDepth = 2;
  static constexpr int kPlanes = 1;
  static constexpr double kHeadroom = 0;
  // A scale rounded into a bfloat16 query would cost six times the error that the query itself has.
  static constexpr bool kScaleQuery = false;

  static FASTATTN_INLINE __m512 run(__m512 a, __m512 b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static FASTATTN_INLINE __m512 power(__m512 x) { return exp2<V, Precision::bfloat16>(x); }
  static FASTATTN_INLINE void pack_probs(const __m512 (&prob)[2], __m512 (&operand)[1]) {
    operand[0] = pair_halves(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(prob[1], prob[0])));
  }
  // Sixteen numbers and the sixteen after them, as they stand.
  static FASTATTN_INLINE __m512 pair_lanes(__m512 low, __m512 high) {
    return reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(high, low));
  }
  static FASTATTN_INLINE __m512 scale_probabilities(__m512 operand, __m512 scale) {
    const __m512i pairs = _mm512_castps_si512(operand);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000U))));
    const __m512 scaled[2] = {_mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale)};
    __m512 out[1];
    pack_probs(scaled, out);
    return out[0];
  }
  // Of the factor only the sign, as a flipped bit.
  static FASTATTN_INLINE __m512 load_query(const Bfloat16* row, int count, double factor) {
    const auto* lanes = reinterpret_cast<const float*>(row);
    const __m512 x = count == V::kWidth ? V::load(lanes) : V::load_partial(lanes, count);
    return V::flip_bits(x, factor < 0 ? 0x80008000U : 0);
  }
};

// Two rows of bfloat16 values, interleaved in quarters of a vector.
struct Bf16Pairs {
  using Reg = __m512;
  using Row = __m512i;
  static constexpr bool kWidens = false;
  static FASTATTN_INLINE Reg zero() { return _mm512_setzero_ps(); }
  static FASTATTN_INLINE Row load(const Bfloat16* row, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, row); }
  static FASTATTN_INLINE void interleave(Row even, Row odd, Reg (&pairs)[2]) {
    pairs[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(even, odd));
    pairs[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(even, odd));
  }
  static FASTATTN_INLINE Reg run(Reg pairs, __m512i probs, Reg sum) {
    return Bf16PairProduct::run(pairs, _mm512_castsi512_ps(probs), sum);
  }
  static FASTATTN_INLINE Reg run(Reg pairs, ProbPair probs, Reg sum) {
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(pairs), "m"(probs));
    return sum;
  }
  // Columns 0..3, 8..11 and so on, and the others, to the first sixteen and those after them.
  static FASTATTN_INLINE void order(Reg (&columns)[2]) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512d low = _mm512_castps_pd(columns[0]);
    const __m512d high = _mm512_castps_pd(columns[1]);
    columns[0] = _mm512_castpd_ps(_mm512_permutex2var_pd(low, first, high));
    columns[1] = _mm512_castpd_ps(_mm512_permutex2var_pd(low, second, high));
  }
  static FASTATTN_INLINE void add_to(float* to, Reg sum, float /*scale*/) {
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum));
  }
};

// Rows of bfloat16 keys dotted with rows of queries as they stand, two numbers a lane.
struct PairDot {
  using V = VecF32;
  using Sums = V;
  using Prob = Bfloat16;
  using Read = Bfloat16;
  static constexpr int kElements = 2 * V::kWidth;
  static constexpr bool kScaleQuery = false;
  static constexpr bool kWords = false;
  static constexpr bool kPairsValues = true;
  static FASTATTN_INLINE __m512 load(const Bfloat16* row) { return V::load(reinterpret_cast<const float*>(row)); }
  static FASTATTN_INLINE __m512 load_partial(const Bfloat16* row, int count) {
    return reinterpret_cast<__m512>(_mm512_maskz_loadu_epi16(first(count), row));
  }
  static FASTATTN_INLINE __m512 run(__m512 key, __m512 query, __m512 sum) {
    return Bf16PairProduct::run(key, query, sum);
  }
  static FASTATTN_INLINE __m512 load_query(const Bfloat16* row, int count, double factor) {
    return V::flip_bits(count == kElements ? load(row) : load_partial(row, count), factor < 0 ? 0x80008000U : 0);
  }
  // As add_value_rows does.
  template <class E>
  static FASTATTN_NOINLINE void add_values(const Panel<E>& panel, const float* probs, const char* const* values,
                                           int64_t begin, int64_t end, int64_t value_dim, int64_t output_stride,
                                           bool adjacent) {
    alignas(64) uint16_t words[E::kLanes * E::kBlockKeys];
    for (int lane = 0; lane < panel.live; ++lane) {
      for (int64_t key = round_down(begin, E::kWidth); key < end; key += E::kWidth) {
        const int64_t at = lane * E::kBlockKeys + key;
        _mm256_store_si256(reinterpret_cast<__m256i*>(words + at),
                           reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(V::load(probs + at))));
      }
    }
    const float scales[E::kLanes] = {};
    add_paired_values<E, Bf16Pairs>(panel, words, scales, values, begin, end, value_dim, output_stride, adjacent);
  }
};

}  // namespace
}  // namespace fastattn
