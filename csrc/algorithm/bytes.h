// The 8-bit formats of quantised caches as storage, and their conversions in portable code (the vector tiers use their
// own). A number is stored as the code nearest to it, ties to even, after division by the scale of its row.
#pragma once

#include <cstdint>

#include "algorithm/half.h"

namespace fastattn {
namespace {

struct Int8 {
  int8_t bits;
};
struct Float8E4M3 {  // "fn": no infinities, NaN is 0x7f and 0xff
  uint8_t bits;
};
struct Float8E5M2 {  // the upper half of a float16
  uint8_t bits;
};
// Codes of either of the last two: how rows of them are read until their type is looked at.
struct Float8 {
  uint8_t bits;
};

// The largest number each can hold: what a row's largest magnitude is scaled to.
template <class T>
constexpr float kLargestCode = 0;
template <>
constexpr float kLargestCode<Int8> = 127;
template <>
constexpr float kLargestCode<Float8E4M3> = 448;
template <>
constexpr float kLargestCode<Float8E5M2> = 57344;

inline float to_float(Int8 x) { return x.bits; }

inline float to_float(Float8E4M3 x) {
  const uint32_t sign = uint32_t{x.bits & 0x80U} << 24;
  const uint32_t magnitude = x.bits & 0x7fU;
  // Subnormals are counted in their step, and not made by a multiplication of a float32's: those may be flushed to 0.
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9F;
  const uint32_t normal = magnitude == 0x7fU ? 0x7fc00000U : (magnitude << 20) + (120U << 23);
  return bits_to_float(sign | (magnitude < 8 ? float_to_bits(small) : normal));
}

inline float to_float(Float8E5M2 x) { return to_float(Float16{static_cast<uint16_t>(x.bits << 8)}); }

// The magnitude of x, at most `largest`: compared as integers, without a branch, so that loops become vectors.
inline uint32_t bounded_magnitude(uint32_t bits, float largest) {
  const auto magnitude = static_cast<int32_t>(bits & 0x7fffffffU);
  const auto limit = static_cast<int32_t>(float_to_bits(largest));
  return static_cast<uint32_t>(magnitude < limit ? magnitude : limit);
}

// All ones where a < b.
inline uint32_t mask_less(uint32_t a, uint32_t b) {
  return 0U - static_cast<uint32_t>(static_cast<int32_t>(a) < static_cast<int32_t>(b));
}

// The code nearest to x, which must be no NaN; past the largest code it is the largest.
inline void from_float(float x, Int8* p) {
  const uint32_t bits = float_to_bits(x);
  // Adding 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
  const uint32_t code = float_to_bits(bits_to_float(bounded_magnitude(bits, 127)) + 0x1p23F) & 0xffU;
  const uint32_t sign = 0U - (bits >> 31);
  p->bits = static_cast<int8_t>(static_cast<int32_t>((code ^ sign) - sign));
}

inline void from_float(float x, Float8E4M3* p) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t magnitude = bounded_magnitude(bits, 448);
  const uint32_t rounded = magnitude + 0x7ffffU + ((magnitude >> 20) & 1U);
  // Subnormal: adding 2^14 lines the bits up, in steps of 2^-9.
  const uint32_t small = float_to_bits(bits_to_float(magnitude) + 0x1p14F) - float_to_bits(0x1p14F);
  const uint32_t is_small = mask_less(magnitude, 0x3c800000U);
  const uint32_t code = (small & is_small) | (((rounded >> 20) - (120U << 3)) & ~is_small);
  p->bits = static_cast<uint8_t>(((bits >> 24) & 0x80U) | code);
}

inline void from_float(float x, Float8E5M2* p) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t magnitude = bounded_magnitude(bits, 57344);
  const uint32_t rounded = magnitude + 0xfffffU + ((magnitude >> 21) & 1U);
  const uint32_t small = float_to_bits(bits_to_float(magnitude) + 0x1p7F) - float_to_bits(0x1p7F);
  const uint32_t is_small = mask_less(magnitude, 0x38800000U);
  const uint32_t code = (small & is_small) | (((rounded >> 21) - (112U << 2)) & ~is_small);
  p->bits = static_cast<uint8_t>(((bits >> 24) & 0x80U) | code);
}

// How the bits of a code stand in a bfloat16, which holds every such number exactly: the magnitude shifted, with so
// much added to its exponent. Subnormals, below kFirst, are looked up, and past kLast are infinities and NaN.
template <class Code>
struct Float8Bits;
template <>
struct Float8Bits<Float8E4M3> {
  static constexpr int kShift = 4;
  static constexpr int kExponent = (127 - 7) << 7;
  static constexpr int kFirst = 8;
  static constexpr int kLast = 0x7e;
};
template <>
struct Float8Bits<Float8E5M2> {
  static constexpr int kShift = 5;
  static constexpr int kExponent = (127 - 15) << 7;
  static constexpr int kFirst = 4;
  static constexpr int kLast = 0x7b;
};

template <class Code>
inline Bfloat16 to_bfloat16(Code x) {
  return {static_cast<uint16_t>(float_to_bits(to_float(x)) >> 16)};
}

// The codes that are no normal numbers, as bfloat16, by their lower five bits; and others between.
template <class Code>
struct Float8Specials {
  alignas(64) Bfloat16 numbers[32];
  Float8Specials() {
    for (int i = 0; i < 32; ++i) {
      numbers[i] = to_bfloat16(Code{static_cast<uint8_t>(i < 16 ? i : 0x60 + i)});
    }
  }
};

// The numbers of codes 0 to 127, as their lower and upper bytes. The other codes are the same with a sign.
struct Float8Table {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
};

template <class Code>
inline Float8Table tabulate() {
  Float8Table table;
  for (int code = 0; code < 128; ++code) {
    const Bfloat16 number = to_bfloat16(Code{static_cast<uint8_t>(code)});
    table.low[code] = static_cast<uint8_t>(number.bits);
    table.high[code] = static_cast<uint8_t>(number.bits >> 8);
  }
  return table;
}

inline const Float8Table& float8_table(bool e4m3) {
  static const Float8Table tables[2] = {tabulate<Float8E5M2>(), tabulate<Float8E4M3>()};
  return tables[e4m3 ? 1 : 0];
}

inline float to_scalar(Int8 x) { return to_float(x); }
inline float to_scalar(Float8E4M3 x) { return to_float(x); }
inline float to_scalar(Float8E5M2 x) { return to_float(x); }

}  // namespace
}  // namespace fastattn
