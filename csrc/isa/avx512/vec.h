// AVX-512 (F, BW, DQ, VL) primitives: 16 floats or 8 doubles a register.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "algorithm/bytes.h"
#include "isa/avx512/mask_bits.h"
#include "isa/denormals.h"

namespace fastattn {
namespace {

template <class T>
constexpr bool kIsBfloat16 = false;
template <>
constexpr bool kIsBfloat16<Bfloat16> = true;

// Sums over lanes, which Lanes adds.
template <class Lanes>
struct LaneSums {
  using Reg = __m512;
  // totals[i] = the sum of r[i]'s lanes.
  static void sum_lanes(const Reg (&r)[16], float* totals) {
    Reg quarters[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      quarters[i] = sum_quarters(r[i], r[i + 4], r[i + 8], r[i + 12]);
    }
    _mm512_storeu_ps(totals, sum_within_quarters(quarters));
  }
  // The same in two steps: what is left of four vectors' sums in a quarter each, and the sums of sixteen vectors, a
  // quarter's of r[0] to r[3] one after another.
  static Reg sum_quarters(Reg a, Reg b, Reg c, Reg d) { return add_quarters(add_halves(a, b), add_halves(c, d)); }
  static Reg sum_within_quarters(const Reg (&r)[4]) {
    return Lanes::finish(add_pairs(add_pairs(r[0], r[1]), add_pairs(r[2], r[3])));
  }
  static void sum_lanes(const Reg (&r)[8], float* totals) {
    Reg quarters[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      quarters[i] = add_quarters(add_halves(r[i], r[i + 2]), add_halves(r[i + 4], r[i + 6]));
    }
    // Every quarter has two sums, twice.
    const Reg pairs = add_pairs(quarters[0], quarters[1]);
    const Reg sums = Lanes::finish(add_pairs(pairs, pairs));
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 0, 0, 0, 0);
    _mm256_storeu_ps(totals, _mm512_castps512_ps256(
                                 _mm512_castsi512_ps(_mm512_permutexvar_epi64(order, _mm512_castps_si512(sums)))));
  }

  // Steps of sums over lanes: a's lanes added to half as many, then b's.
  static Reg add_halves(Reg a, Reg b) {
    return Lanes::add(_mm512_shuffle_f32x4(a, b, 0x4e), _mm512_mask_blend_ps(0xff00, a, b));
  }
  static Reg add_quarters(Reg a, Reg b) {
    return Lanes::add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  static Reg add_pairs(Reg a, Reg b) {  // within each quarter
    return Lanes::add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  }
  static Reg finish(Reg sums) { return Lanes::finish(sums); }
};

struct FloatLanes {
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m512 finish(__m512 sums) { return sums; }
};

struct VecF32 : LaneSums<FloatLanes> {
  using Scalar = float;
  using Reg = __m512;
  using Mask = __mmask16;
  using MaskReader = WideMaskBits;
  using FlushDenormals = DenormalsFlushed;
  static constexpr int kWidth = 16;
  static constexpr int kSums = 16;  // that sum_lanes totals together at most

  static Reg iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static Reg load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_partial(float* p, Reg x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }

  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  // The product itself broadcasts `a`, which costs nothing. Compilers leave that to a register, and one that is filled
  // from memory costs about as much as a product.
  static Reg fma_from(const float& a, Reg b, Reg c) {
    __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(a));
    return c;
  }
  static Reg fms(Reg a, Reg b, Reg c) { return _mm512_fmsub_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }  // the same
  static Reg abs(Reg a) { return _mm512_abs_ps(a); }
  static Reg copysign(Reg magnitude, Reg sign) {
    const Reg bit = _mm512_set1_ps(-0.0F);
    return _mm512_or_ps(_mm512_andnot_ps(bit, magnitude), _mm512_and_ps(bit, sign));
  }

  static Mask less(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask less_equal(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static Mask unordered(Reg a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  static Mask both(Mask a, Mask b) { return a & b; }
  static bool any(Mask m) { return m != 0; }
  static uint32_t bits(Mask m) { return m; }
  static Mask from_bits(uint32_t bits) { return static_cast<Mask>(bits); }
  static Reg select(Mask m, Reg yes, Reg no) { return _mm512_mask_mov_ps(no, m, yes); }

  static Reg fraction(Reg x) { return _mm512_reduce_ps(x, 0x01); }   // x - floor(x); 0 for infinities
  static Reg scale(Reg x, Reg n) { return _mm512_scalef_ps(x, n); }  // x * 2^floor(n)
  // The floor of x, and 2 to that, which is 0 and infinity at these two.
  static constexpr float kZeroPower = -127.0F;
  static constexpr float kInfinitePower = 128.0F;
  static void split(Reg x, Reg& floor, Reg& power) {
    // The sum's low bits are the exponent field of 2^floor(x).
    const Reg magic = _mm512_set1_ps(12582912.0F + 127.0F);  // 1.5 * 2^23 + bias
    const Reg shifted = _mm512_add_round_ps(x, magic, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    floor = _mm512_sub_ps(shifted, magic);
    power = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23));
  }

  static Reg load(const Bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Reg load_partial(const Bfloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  // Two vectors of a row in whatever order is quickest, and how sums over them are put in order.
  template <class T>
  static void load_two(const T* p, Reg& a, Reg& b) {
    a = load(p);
    b = load(p + kWidth);
  }
  static void load_two(const Bfloat16* p, Reg& even, Reg& odd) {
    const __m512i x = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000U))));
  }
  template <class T>
  static void order_two(Reg& a, Reg& b) {
    if constexpr (kIsBfloat16<T>) {
      const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
      const Reg even = a;
      a = _mm512_permutex2var_ps(even, low, b);
      b = _mm512_permutex2var_ps(even, high, b);
    }
  }
  static void store(Bfloat16* p, Reg x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
  static void store_partial(Bfloat16* p, Reg x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x)); }

  static Reg load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Reg load_partial(const Float16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static void store(Float16* p, Reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_partial(Float16* p, Reg x, int n) {
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static Reg load(const Int8* p) { return widen_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p); }
  static Reg load(const Float8E4M3* p) { return widen_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p); }
  static Reg load(const Float8E5M2* p) { return widen_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p); }
  template <class Byte>
  static Reg load_partial_bytes(const Byte* p, int n) {
    return widen_bytes(_mm_maskz_loadu_epi8(first(n), p), p);
  }
  static Reg load_partial(const Int8* p, int n) { return load_partial_bytes(p, n); }
  static Reg load_partial(const Float8E4M3* p, int n) { return load_partial_bytes(p, n); }
  static Reg load_partial(const Float8E5M2* p, int n) { return load_partial_bytes(p, n); }

  // 32 numbers of 8 bits.
  template <class Code>
  static void decode(const Code* p, const Float8Specials<Code>& specials, Bfloat16* out) {
    using Bits = Float8Bits<Code>;
    const __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
    const __m512i normal =
        _mm512_add_epi16(_mm512_slli_epi16(magnitude, Bits::kShift), _mm512_set1_epi16(Bits::kExponent));
    // Smaller ones wrap around.
    const __mmask32 special = _mm512_cmpgt_epu16_mask(_mm512_sub_epi16(magnitude, _mm512_set1_epi16(Bits::kFirst)),
                                                      _mm512_set1_epi16(Bits::kLast - Bits::kFirst));
    const __m512i number = _mm512_mask_permutexvar_epi16(normal, special, code, _mm512_load_si512(specials.numbers));
    const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
    _mm512_storeu_si512(out, _mm512_or_si512(_mm512_andnot_si512(sign, number), _mm512_and_si512(code, sign)));
  }

  // 32-bit lanes that pair 16-bit numbers of two rows: even in the low half, odd in the high half.
  template <class Half>
  static Reg interleave(const Half* even, const Half* odd, int n) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), even));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), odd));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static Reg flip_bits(Reg x, uint32_t pattern) {
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(pattern))));
  }

  // Stores lanes [part * n, part * n + n) of x, n = 4, 8 or 16.
  template <int n>
  static void store_part(float* p, Reg x, int part) {
    if constexpr (n == kWidth) {
      store(p, x);
    } else if constexpr (n == 8) {
      _mm256_storeu_ps(p, part == 0 ? _mm512_castps512_ps256(x) : _mm512_extractf32x8_ps(x, 1));
    } else {
      static_assert(n == 4);
      _mm_storeu_ps(p, part == 0   ? _mm512_castps512_ps128(x)
                       : part == 1 ? _mm512_extractf32x4_ps(x, 1)
                       : part == 2 ? _mm512_extractf32x4_ps(x, 2)
                                   : _mm512_extractf32x4_ps(x, 3));
    }
  }

  // r[i][j] <-> r[j][i]
  static void transpose(Reg (&r)[16]) {
    Reg t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
  }

 private:
  static Mask first(int n) { return static_cast<Mask>((1U << n) - 1U); }
  static Reg widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static Reg widen_bytes(__m128i x, const Int8* /*kind*/) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
  static Reg widen_bytes(__m128i x, const Float8E5M2* /*kind*/) {  // the upper half of a float16
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(x), 8));
  }
  static Reg widen_bytes(__m128i x, const Float8E4M3* /*kind*/) {
    // As a float16 of exponents 8 less, which holds subnormals too; the product brings them up.
    const __m256i code = _mm256_cvtepi8_epi16(x);
    const __m256i magnitude = _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x7f)), 7);
    const __m256i sign = _mm256_and_si256(code, _mm256_set1_epi16(static_cast<int16_t>(0x8000)));
    const __m256i nan = _mm256_maskz_set1_epi16(_mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x3f80)), 0x7e00);
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(_mm256_or_si256(magnitude, sign), nan)),
                         _mm512_set1_ps(256.0F));
  }
  // The bits of x with the upper half rounded to nearest even; a NaN stays one.
  static __m512i rounded_bits(Reg x) {
    const __m512i raw = _mm512_castps_si512(x);
    const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(raw, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(raw, _mm512_set1_epi32(0x7fff)), lsb);
    return _mm512_mask_or_epi32(rounded, unordered(x), raw, _mm512_set1_epi32(0x00400000));
  }
  static __m256i narrow(Reg x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(x), 16)); }
};

struct VecF64 {
  using Scalar = double;
  using Reg = __m512d;
  using Mask = __mmask8;
  using MaskReader = WideMaskBits;
  using FlushDenormals = DenormalsFlushed;
  static constexpr int kWidth = 8;
  static constexpr int kSums = 8;

  static Reg iota() { return _mm512_setr_pd(0, 1, 2, 3, 4, 5, 6, 7); }
  static Reg zero() { return _mm512_setzero_pd(); }
  static Reg set1(double x) { return _mm512_set1_pd(x); }
  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, Reg x) { _mm512_storeu_pd(p, x); }
  static Reg load_partial(const double* p, int n) { return _mm512_maskz_loadu_pd(first(n), p); }
  static void store_partial(double* p, Reg x, int n) { _mm512_mask_storeu_pd(p, first(n), x); }
  static Reg load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static Reg load_partial(const float* p, int n) { return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(first(n), p)); }

  template <class T>
  static void load_two(const T* p, Reg& a, Reg& b) {
    a = load(p);
    b = load(p + kWidth);
  }
  template <class T>
  static void order_two(Reg& /*a*/, Reg& /*b*/) {}

  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static Reg fms(Reg a, Reg b, Reg c) { return _mm512_fmsub_pd(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_pd(a, b); }
  static Reg abs(Reg a) { return _mm512_abs_pd(a); }
  static Reg copysign(Reg magnitude, Reg sign) {
    const Reg bit = _mm512_set1_pd(-0.0);
    return _mm512_or_pd(_mm512_andnot_pd(bit, magnitude), _mm512_and_pd(bit, sign));
  }

  static Mask less(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
  static Mask less_equal(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
  static Mask unordered(Reg a) { return _mm512_cmp_pd_mask(a, a, _CMP_UNORD_Q); }
  static Mask both(Mask a, Mask b) { return a & b; }
  static bool any(Mask m) { return m != 0; }
  static uint32_t bits(Mask m) { return m; }
  static Mask from_bits(uint32_t bits) { return static_cast<Mask>(bits); }
  static Reg select(Mask m, Reg yes, Reg no) { return _mm512_mask_mov_pd(no, m, yes); }

  static constexpr double kZeroPower = -1023.0;
  static constexpr double kInfinitePower = 1024.0;
  static void split(Reg x, Reg& floor, Reg& power) {
    const Reg magic = _mm512_set1_pd(6755399441055744.0 + 1023.0);  // 1.5 * 2^52 + bias
    const Reg shifted = _mm512_add_round_pd(x, magic, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    floor = _mm512_sub_pd(shifted, magic);
    power = _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(shifted), 52));
  }

  template <int n>
  static void store_part(double* p, Reg x, int /*part*/) {
    static_assert(n == kWidth);
    store(p, x);
  }

  static void sum_lanes(const Reg (&r)[8], double* totals) {
    for (int i = 0; i < 8; ++i) {
      totals[i] = _mm512_reduce_add_pd(r[i]);
    }
  }

  static void transpose(Reg (&r)[8]) {
    Reg t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm512_unpacklo_pd(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      r[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
      r[i + 2] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
      r[i + 4] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
      r[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f64x2(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f64x2(r[i], r[i + 4], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      r[i] = t[i];
    }
  }

 private:
  static Mask first(int n) { return static_cast<Mask>((1U << n) - 1U); }
};

}  // namespace
}  // namespace fastattn
