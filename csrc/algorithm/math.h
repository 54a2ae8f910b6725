// Elementary functions on a Vec. Polynomial coefficients are least-maximum relative-error fits (Lawson iteration in
// extended precision) on the interval named beside them; at full precision the constant term of exp2 is held at 1, so
// that exp2(0) is 1.
#pragma once

#include "algorithm/half.h"

namespace fastattn {
namespace {

// How exactly exp2 has to be: as the accumulator holds it, or as a bfloat16 product will use it.
enum class Precision { full, bfloat16 };

template <class Scalar, Precision precision>
struct Exp2Terms;

template <>
struct Exp2Terms<float, Precision::full> {  // |x| <= 1/2, relative error 9.2e-8
  // 1.5 * 2^23 + 127: adding it rounds to an integer, which stands in the low bits as the exponent field of 2^n.
  static constexpr float kMagic = 12583039.0F;
  static constexpr float kLowest = -127.0F;  // 2^x is flushed to 0 from here on
  static constexpr int kDegree = 5;
  static constexpr float kTerms[] = {1.0F, 0.69314700F, 0.24022242F, 0.055507336F, 0.009671513F, 0.0013264724F};
};

template <>
struct Exp2Terms<float, Precision::bfloat16> {  // relative error 7.5e-5, a fiftieth of a bfloat16 step
  static constexpr float kMagic = 12583039.0F;
  static constexpr float kLowest = -127.0F;
  static constexpr int kDegree = 3;
  static constexpr float kTerms[] = {0.99992806F, 0.69326097F, 0.24261114F, 0.055171628F};
};

template <>
struct Exp2Terms<double, Precision::full> {             // relative error 3.6e-18
  static constexpr double kMagic = 6755399441056767.0;  // 1.5 * 2^52 + 1023
  static constexpr double kLowest = -1023.0;
  static constexpr int kDegree = 11;
  static constexpr double kTerms[] = {1.0,
                                      0.6931471805599453,
                                      0.2402265069591013,
                                      0.055504108664820084,
                                      0.009618129107594065,
                                      0.0013333558146772782,
                                      0.00015403530457254645,
                                      1.5252733497040086e-05,
                                      1.3215435190245519e-06,
                                      1.0178197171272599e-07,
                                      7.073801157353702e-09,
                                      4.435230158540805e-10};
};

template <Precision precision>
struct ScaledTerms;

template <>
struct ScaledTerms<Precision::full> {  // 2^x on [0, 1), relative error 7.5e-8
  static constexpr int kDegree = 5;
  static constexpr float kTerms[] = {0.99999994F, 0.69315308F, 0.24015361F, 0.055826314F, 0.0089893425F, 0.001877576F};
};

template <>
struct ScaledTerms<Precision::bfloat16> {  // relative error 7.5e-5
  static constexpr int kDegree = 3;
  static constexpr float kTerms[] = {0.99992520F, 0.69583350F, 0.22606727F, 0.078024462F};
};

// The same as exp2 below, for a Vec with instructions that split off the fraction above the floor and scale by a power
// of two: half the operations, a gain where those instructions are not slower than the additions they replace.
template <class V, Precision precision>
inline typename V::Reg exp2_by_scale(typename V::Reg x) {
  using T = ScaledTerms<precision>;
  const auto fraction = V::fraction(x);
  auto y = V::set1(T::kTerms[T::kDegree]);
#pragma GCC unroll 8
  for (int i = T::kDegree - 1; i >= 0; --i) {
    y = V::fma(y, fraction, V::set1(T::kTerms[i]));
  }
  return V::scale(y, x);
}

// 2^x for x below 128 (1024 in double); results under the normal range are 0, a NaN stays one.
template <class V, Precision precision = Precision::full>
inline typename V::Reg exp2(typename V::Reg x) {
  using T = Exp2Terms<typename V::Scalar, precision>;
  const auto magic = V::set1(T::kMagic);
  const auto clamped = V::max(V::set1(T::kLowest), x);
  const auto shifted = V::add(clamped, magic);
  const auto fraction = V::sub(clamped, V::sub(shifted, magic));
  auto y = V::set1(T::kTerms[T::kDegree]);
#pragma GCC unroll 16
  for (int i = T::kDegree - 1; i >= 0; --i) {
    y = V::fma(y, fraction, V::set1(T::kTerms[i]));
  }
  // A product and not an addition to the exponent: NaN times anything is NaN.
  return V::mul(y, V::power_of_two(shifted));
}

template <class Scalar>
struct TanhTerms;

template <>
struct TanhTerms<float> {  // tanh(x) / x - 1 in x^2 for |x| <= 0.55, relative error 1.1e-9
  static constexpr float kLimit = 0.55F;
  static constexpr int kCount = 5;
  static constexpr float kTerms[] = {-0.33333318F, 0.13332586F, -0.05385231F, 0.021071679F, -0.0062742382F};
};

template <>
struct TanhTerms<double> {  // |x| <= 0.3, relative error 7.3e-17
  static constexpr double kLimit = 0.3;
  static constexpr int kCount = 7;
  static constexpr double kTerms[] = {-0.333333333333268,    0.13333333331475838,   -0.05396825218087503,
                                      0.02186940684884982,   -0.008861232942637218, 0.0035649895563364046,
                                      -0.0012624623758479706};
};

// tanh: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel, that formula elsewhere.
template <class V>
inline typename V::Reg tanh(typename V::Reg x) {
  using T = TanhTerms<typename V::Scalar>;
  constexpr double kTwoLog2E = 2.8853900817779268;
  const auto square = V::mul(x, x);
  auto y = V::set1(T::kTerms[T::kCount - 1]);
#pragma GCC unroll 8
  for (int i = T::kCount - 2; i >= 0; --i) {
    y = V::fma(y, square, V::set1(T::kTerms[i]));
  }
  const auto near_zero = V::fma(V::mul(y, square), x, x);
  const auto magnitude = V::abs(x);
  const auto one = V::set1(1);
  // e^-2|x| stays within (0, 1]: no overflow, and -inf and +inf come out as -1 and 1.
  const auto e = exp2<V>(V::mul(magnitude, V::set1(static_cast<typename V::Scalar>(-kTwoLog2E))));
  const auto far = V::copysign(V::div(V::sub(one, e), V::add(one, e)), x);
  return V::select(V::less(magnitude, V::set1(T::kLimit)), near_zero, far);
}

}  // namespace
}  // namespace fastattn
