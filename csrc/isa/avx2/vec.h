// AVX2, FMA and F16C primitives: 8 floats or 4 doubles a register.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "algorithm/bytes.h"
#include "algorithm/mask_bits.h"
#include "isa/denormals.h"

namespace fastattn {
namespace {

// Masks are registers here: all ones where true.
struct VecF32 {
  using Scalar = float;
  using Reg = __m256;
  using Mask = __m256;
  using MaskReader = MaskBits;
  using FlushDenormals = DenormalsFlushed;
  static constexpr int kWidth = 8;
  static constexpr int kSums = 8;

  static Reg iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static Reg load_partial(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_partial(float* p, Reg x, int n) { _mm256_maskstore_ps(p, first(n), x); }

  template <class T>
  static void load_two(const T* p, Reg& a, Reg& b) {
    a = load(p);
    b = load(p + kWidth);
  }
  template <class T>
  static void order_two(Reg& /*a*/, Reg& /*b*/) {}

  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg fms(Reg a, Reg b, Reg c) { return _mm256_fmsub_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }  // the same
  static Reg abs(Reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), a); }
  static Reg copysign(Reg magnitude, Reg sign) {
    const Reg bit = _mm256_set1_ps(-0.0F);
    return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign));
  }

  static Mask less(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Mask less_equal(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
  static Mask unordered(Reg a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
  static Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
  static uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
  static Mask from_bits(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane));
  }
  static Reg select(Mask m, Reg yes, Reg no) { return _mm256_blendv_ps(no, yes, m); }

  // The floor of x, and 2 to that, which is 0 and infinity at these two.
  static constexpr float kZeroPower = -127.0F;
  static constexpr float kInfinitePower = 128.0F;
  static void split(Reg x, Reg& floor, Reg& power) {
    floor = _mm256_floor_ps(x);
    // The sum's low bits are the exponent field of 2^floor(x).
    const Reg shifted = _mm256_add_ps(floor, _mm256_set1_ps(12582912.0F + 127.0F));  // 1.5 * 2^23 + bias
    power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
  }

  static Reg load(const Bfloat16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Reg load_partial(const Bfloat16* p, int n) { return widen(load_halves(p, n)); }
  static void store(Bfloat16* p, Reg x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x)); }
  static void store_partial(Bfloat16* p, Reg x, int n) { store_halves(p, narrow(x), n); }

  static Reg load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Reg load_partial(const Float16* p, int n) { return _mm256_cvtph_ps(load_halves(p, n)); }
  static void store(Float16* p, Reg x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_partial(Float16* p, Reg x, int n) {
    store_halves(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT), n);
  }

  static Reg load(const Int8* p) { return widen_bytes(load_bytes(p, kWidth), p); }
  static Reg load(const Float8E4M3* p) { return widen_bytes(load_bytes(p, kWidth), p); }
  static Reg load(const Float8E5M2* p) { return widen_bytes(load_bytes(p, kWidth), p); }
  static Reg load_partial(const Int8* p, int n) { return widen_bytes(load_bytes(p, n), p); }
  static Reg load_partial(const Float8E4M3* p, int n) { return widen_bytes(load_bytes(p, n), p); }
  static Reg load_partial(const Float8E5M2* p, int n) { return widen_bytes(load_bytes(p, n), p); }

  // 16 numbers of 8 bits.
  template <class Code>
  static void decode(const Code* p, const Float8Specials<Code>& specials, Bfloat16* out) {
    using Bits = Float8Bits<Code>;
    const __m256i code = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi16(0x7f));
    const __m256i normal =
        _mm256_add_epi16(_mm256_slli_epi16(magnitude, Bits::kShift), _mm256_set1_epi16(Bits::kExponent));
    const __m256i last = _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(Bits::kLast));
    const __m256i large = _mm256_or_si256(normal, _mm256_and_si256(last, _mm256_set1_epi16(0x7f80)));
    // The bytes 2 * code and 2 * code + 1 of a table.
    const __m256i bytes =
        _mm256_add_epi16(_mm256_mullo_epi16(magnitude, _mm256_set1_epi16(0x202)), _mm256_set1_epi16(0x100));
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(specials.numbers)));
    const __m256i small = _mm256_shuffle_epi8(table, bytes);
    const __m256i first = _mm256_cmpgt_epi16(_mm256_set1_epi16(Bits::kFirst), magnitude);
    const __m256i number = _mm256_blendv_epi8(large, small, first);
    const __m256i sign = _mm256_and_si256(code, _mm256_set1_epi16(static_cast<int16_t>(0x8000)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_or_si256(number, sign));
  }

  // Stores lanes [part * n, part * n + n) of x, n = 4 or 8.
  template <int n>
  static void store_part(float* p, Reg x, int part) {
    if constexpr (n == kWidth) {
      store(p, x);
    } else {
      static_assert(n == 4);
      _mm_storeu_ps(p, part == 0 ? _mm256_castps256_ps128(x) : _mm256_extractf128_ps(x, 1));
    }
  }

  // totals[i] = the sum of r[i]'s lanes.
  static void sum_lanes(const Reg (&r)[8], float* totals) {
    const Reg low = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
    const Reg high = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
    store(totals, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
  }

  // r[i][j] <-> r[j][i]
  static void transpose(Reg (&r)[8]) {
    Reg t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    Reg u[8];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
  }

 private:
  static __m128i load_bytes(const void* p, int n) {
    int64_t bytes = 0;
    memcpy(&bytes, p, static_cast<size_t>(n));
    return _mm_cvtsi64_si128(bytes);
  }
  static Reg widen_bytes(__m128i x, const Int8* /*kind*/) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)); }
  static Reg widen_bytes(__m128i x, const Float8E5M2* /*kind*/) {  // the upper half of a float16
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(x), 8));
  }
  static Reg widen_bytes(__m128i x, const Float8E4M3* /*kind*/) {
    // As a float16 of exponents 8 less, which holds subnormals too; the product brings them up.
    const __m128i code = _mm_cvtepi8_epi16(x);
    const __m128i magnitude = _mm_slli_epi16(_mm_and_si128(code, _mm_set1_epi16(0x7f)), 7);
    const __m128i sign = _mm_and_si128(code, _mm_set1_epi16(static_cast<int16_t>(0x8000)));
    const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x3f80)), _mm_set1_epi16(0x7e00));
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(_mm_or_si128(magnitude, sign), nan)), _mm256_set1_ps(256.0F));
  }
  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m128i load_halves(const void* p, int n) {
    __m128i x = _mm_setzero_si128();
    memcpy(&x, p, static_cast<size_t>(n) * sizeof(uint16_t));
    return x;
  }
  static void store_halves(void* p, __m128i x, int n) { memcpy(p, &x, static_cast<size_t>(n) * sizeof(uint16_t)); }
  static Reg widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  // To nearest even; a NaN stays one.
  static __m128i narrow(Reg x) {
    const __m256i raw = _mm256_castps_si256(x);
    const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(raw, _mm256_set1_epi32(0x7fff)), lsb);
    const __m256i quiet = _mm256_or_si256(raw, _mm256_set1_epi32(0x00400000));
    const __m256i bits = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(unordered(x)));
    const __m256i high = _mm256_srli_epi32(bits, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
};

struct VecF64 {
  using Scalar = double;
  using Reg = __m256d;
  using Mask = __m256d;
  using MaskReader = MaskBits;
  using FlushDenormals = DenormalsFlushed;
  static constexpr int kWidth = 4;
  static constexpr int kSums = 8;

  static Reg iota() { return _mm256_setr_pd(0, 1, 2, 3); }
  static Reg zero() { return _mm256_setzero_pd(); }
  static Reg set1(double x) { return _mm256_set1_pd(x); }
  static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Reg x) { _mm256_storeu_pd(p, x); }
  static Reg load_partial(const double* p, int n) { return _mm256_maskload_pd(p, first(n)); }
  static void store_partial(double* p, Reg x, int n) { _mm256_maskstore_pd(p, first(n), x); }
  static Reg load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static Reg load_partial(const float* p, int n) {
    const __m128i lanes = _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3));
    return _mm256_cvtps_pd(_mm_maskload_ps(p, lanes));
  }

  template <class T>
  static void load_two(const T* p, Reg& a, Reg& b) {
    a = load(p);
    b = load(p + kWidth);
  }
  template <class T>
  static void order_two(Reg& /*a*/, Reg& /*b*/) {}

  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static Reg fms(Reg a, Reg b, Reg c) { return _mm256_fmsub_pd(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_pd(a, b); }
  static Reg abs(Reg a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }
  static Reg copysign(Reg magnitude, Reg sign) {
    const Reg bit = _mm256_set1_pd(-0.0);
    return _mm256_or_pd(_mm256_andnot_pd(bit, magnitude), _mm256_and_pd(bit, sign));
  }

  static Mask less(Reg a, Reg b) { return _mm256_cmp_pd(a, b, _CMP_LT_OQ); }
  static Mask less_equal(Reg a, Reg b) { return _mm256_cmp_pd(a, b, _CMP_LE_OQ); }
  static Mask unordered(Reg a) { return _mm256_cmp_pd(a, a, _CMP_UNORD_Q); }
  static Mask both(Mask a, Mask b) { return _mm256_and_pd(a, b); }
  static bool any(Mask m) { return _mm256_movemask_pd(m) != 0; }
  static uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_pd(m)); }
  static Mask from_bits(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi64x(bits), lane);
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(set, lane));
  }
  static Reg select(Mask m, Reg yes, Reg no) { return _mm256_blendv_pd(no, yes, m); }

  static constexpr double kZeroPower = -1023.0;
  static constexpr double kInfinitePower = 1024.0;
  static void split(Reg x, Reg& floor, Reg& power) {
    floor = _mm256_floor_pd(x);
    const Reg shifted = _mm256_add_pd(floor, _mm256_set1_pd(6755399441055744.0 + 1023.0));  // 1.5 * 2^52 + bias
    power = _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(shifted), 52));
  }

  template <int n>
  static void store_part(double* p, Reg x, int /*part*/) {
    static_assert(n == kWidth);
    store(p, x);
  }

  static void sum_lanes(const Reg (&r)[8], double* totals) {
    for (int i = 0; i < 8; i += 4) {
      const Reg low = _mm256_hadd_pd(r[i], r[i + 1]);
      const Reg high = _mm256_hadd_pd(r[i + 2], r[i + 3]);
      store(totals + i,
            _mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20), _mm256_permute2f128_pd(low, high, 0x31)));
    }
  }

  static void transpose(Reg (&r)[4]) {
    const Reg t0 = _mm256_unpacklo_pd(r[0], r[1]);
    const Reg t1 = _mm256_unpackhi_pd(r[0], r[1]);
    const Reg t2 = _mm256_unpacklo_pd(r[2], r[3]);
    const Reg t3 = _mm256_unpackhi_pd(r[2], r[3]);
    r[0] = _mm256_permute2f128_pd(t0, t2, 0x20);
    r[1] = _mm256_permute2f128_pd(t1, t3, 0x20);
    r[2] = _mm256_permute2f128_pd(t0, t2, 0x31);
    r[3] = _mm256_permute2f128_pd(t1, t3, 0x31);
  }

 private:
  static __m256i first(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
};

}  // namespace
}  // namespace fastattn
