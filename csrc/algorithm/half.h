// The 16-bit floating-point formats as storage, and their conversions in portable code (the vector tiers use their
// own).
#pragma once

#include <cstdint>
#include <cstring>

namespace fastattn {
namespace {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(Bfloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000U} << 16;
  const uint32_t magnitude = x.bits & 0x7fffU;
  if (magnitude >= 0x7c00U) {  // Inf and NaN
    return bits_to_float(sign | 0x7f800000U | (magnitude << 13));
  }
  // The exponent is rebiased by an exact multiplication, which also normalises subnormals.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000U)));
}

inline Bfloat16 to_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) {
    return {static_cast<uint16_t>((bits >> 16) | 0x40U)};
  }
  return {static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16)};  // to nearest even
}

inline Float16 to_float16(float x) {
  const uint32_t bits = float_to_bits(x);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) {
    return {static_cast<uint16_t>(sign | 0x7e00U)};
  }
  if (magnitude >= 0x47800000U) {  // 65536 and above
    return {static_cast<uint16_t>(sign | 0x7c00U)};
  }
  if (magnitude < 0x38800000U) {  // subnormal: adding 0.5 lines the bits up, rounded to nearest even
    const float aligned = bits_to_float(magnitude) + 0.5F;
    return {static_cast<uint16_t>(sign | (float_to_bits(aligned) - 0x3f000000U))};
  }
  const uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000U) >> 13))};
}

inline float to_scalar(float x) { return x; }
inline double to_scalar(double x) { return x; }
inline float to_scalar(Bfloat16 x) { return to_float(x); }
inline float to_scalar(Float16 x) { return to_float(x); }

inline void from_scalar(double x, double* p) { *p = x; }
inline void from_scalar(double x, float* p) { *p = static_cast<float>(x); }
inline void from_scalar(double x, Bfloat16* p) { *p = to_bfloat16(static_cast<float>(x)); }
inline void from_scalar(double x, Float16* p) { *p = to_float16(static_cast<float>(x)); }

}  // namespace
}  // namespace fastattn
