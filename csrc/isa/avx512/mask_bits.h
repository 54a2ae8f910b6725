// Rows of mask bytes turned into bits, a key's lanes side by side (AVX-512 F and BW): 64 keys at a time.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastattn {
namespace {

// Bit i of byte j <-> bit j of byte i, in each 64-bit part.
inline __m512i transpose_bits(__m512i x) {
  const auto exchange = [&x](int distance, uint64_t mask) __attribute__((always_inline)) {
    const __m512i moved = _mm512_and_si512(_mm512_xor_si512(x, _mm512_srli_epi64(x, static_cast<unsigned>(distance))),
                                           _mm512_set1_epi64(static_cast<int64_t>(mask)));
    x = _mm512_xor_si512(x, _mm512_xor_si512(moved, _mm512_slli_epi64(moved, static_cast<unsigned>(distance))));
  };
  exchange(7, 0x00aa00aa00aa00aaULL);
  exchange(14, 0x0000cccc0000ccccULL);
  exchange(28, 0x00000000f0f0f0f0ULL);
  return x;
}

// Byte b of 64-bit part r -> byte r of part b.
inline __m512i transpose_bytes(__m512i x) {
  // Within 128 bits the bytes of two parts are paired, then pairs are gathered from all over.
  const __m512i pairs = _mm512_shuffle_epi8(
      x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)));
  const __m512i order = _mm512_set_epi16(31, 23, 15, 7, 30, 22, 14, 6, 29, 21, 13, 5, 28, 20, 12, 4, 27, 19, 11, 3, 26,
                                         18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
  return _mm512_permutexvar_epi16(order, pairs);
}

// As algorithm/mask_bits.h, 64 keys at a time.
struct WideMaskBits {
  static constexpr int kKeys = 64;

  template <int kLanes>
  static void read(const uint8_t* const* rows, int64_t key, int64_t count, uint32_t* visible) {
    static_assert(kLanes % 8 == 0 && kLanes <= 32);
    constexpr int kGroups = kLanes / 8;
    const __mmask64 there = count >= kKeys ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
    alignas(64) uint64_t keys[kLanes];  // bit i: the row's byte at key + i
    for (int lane = 0; lane < kLanes; ++lane) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(there, rows[lane] + key);
      keys[lane] = _mm512_test_epi8_mask(bytes, bytes);
    }
    alignas(64) uint8_t lanes[kGroups][64];  // byte i: eight lanes of key + i
    for (int group = 0; group < kGroups; ++group) {
      _mm512_store_si512(lanes[group], transpose_bits(transpose_bytes(_mm512_load_si512(keys + 8 * group))));
    }
    for (int i = 0; i < 64; i += 16) {
      __m512i bits = _mm512_setzero_si512();
      for (int group = 0; group < kGroups; ++group) {
        const __m128i eight = _mm_load_si128(reinterpret_cast<const __m128i*>(lanes[group] + i));
        bits = _mm512_or_si512(bits, _mm512_slli_epi32(_mm512_cvtepu8_epi32(eight), static_cast<unsigned>(8 * group)));
      }
      _mm512_storeu_si512(visible + i, bits);
    }
  }
};

}  // namespace
}  // namespace fastattn
