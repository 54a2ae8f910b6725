// Elementary functions on a Vec. Polynomial coefficients are least-maximum fits (Lawson iteration in extended
// precision) of the relative error on the interval named beside them. At full precision the constant term of exp2 is
// held at 1, so that exp2(0) is 1, and the absolute error was fitted, less of it towards 1, where rounding takes more
// of the two units of the last place that are allowed. tests/cpp/exp2_test.cpp tries every float32.
#pragma once

#include "algorithm/half.h"

namespace fastattn {
namespace {

// How exactly exp2 has to be: as the accumulator holds it, or as a bfloat16 product will use it.
enum class Precision { full, bfloat16 };

// 2^x on [0, 1).
template <class Scalar, Precision precision>
struct Exp2Terms;

template <>
struct Exp2Terms<float, Precision::full> {  // within 1.5 units of the last place near 0, 0.9 near 1
  static constexpr int kDegree = 5;
  static constexpr float kTerms[] = {1.0F, 0.6931532F, 0.24014549F, 0.055858385F, 0.00894639F, 0.0018964402F};
};

template <>
struct Exp2Terms<float, Precision::bfloat16> {  // relative error 7.5e-5, a fiftieth of a bfloat16 step
  static constexpr int kDegree = 3;
  static constexpr float kTerms[] = {0.99992520F, 0.69583350F, 0.22606727F, 0.078024462F};
};

template <Precision precision>
struct ScaledTerms : Exp2Terms<float, precision> {};

template <>
struct ScaledTerms<Precision::full> {  // towards 1 too high by 0.3 units: V::fraction is rounded down
  static constexpr int kDegree = 5;
  static constexpr float kTerms[] = {1.0F, 0.69315344F, 0.24014318F, 0.055865437F, 0.00893807F, 0.0018998209F};
};

template <>
struct Exp2Terms<double, Precision::full> {  // relative error 5.0e-18
  static constexpr int kDegree = 11;
  static constexpr double kTerms[] = {1.0,
                                      0.6931471805599462,
                                      0.24022650695905104,
                                      0.05550410866581233,
                                      0.009618129097774354,
                                      0.0013333558715734632,
                                      0.00015403509727819641,
                                      1.5253224449026377e-05,
                                      1.3207762674760902e-06,
                                      1.0257794512973057e-07,
                                      6.539949755553623e-09,
                                      6.299530491296398e-10};
};

template <class V, class T>
inline typename V::Reg exp2_polynomial(typename V::Reg fraction) {
  auto y = V::set1(T::kTerms[T::kDegree]);
#pragma GCC unroll 16
  for (int i = T::kDegree - 1; i >= 0; --i) {
    y = V::fma(y, fraction, V::set1(T::kTerms[i]));
  }
  return y;
}

// The same as exp2 below, for a Vec with instructions that split off the fraction above the floor and scale by a power
// of two: half the operations, a gain where those instructions are not slower than the additions they replace.
template <class V, Precision precision>
inline typename V::Reg exp2_by_scale(typename V::Reg x) {
  return V::scale(exp2_polynomial<V, ScaledTerms<precision>>(V::fraction(x)), x);
}

// 2^x: within 2 units of the last place on [-126, 128) ([-1022, 1024) in double), 0 below and infinity above; a NaN
// stays one.
template <class V, Precision precision = Precision::full>
inline typename V::Reg exp2(typename V::Reg x) {
  // 2^n is 0 and infinity at these. A NaN passes both, being the second operand.
  const auto clamped = V::min(V::set1(V::kInfinitePower), V::max(V::set1(V::kZeroPower), x));
  typename V::Reg floor;
  typename V::Reg power;
  V::split(clamped, floor, power);
  // A product and not an addition to the exponent: NaN times anything is NaN.
  return V::mul(exp2_polynomial<V, Exp2Terms<typename V::Scalar, precision>>(V::sub(clamped, floor)), power);
}

template <class Scalar>
struct TanhTerms;

template <>
struct TanhTerms<float> {  // tanh(x) / x - 1 in x^2 for |x| <= 0.5, relative error 1.5e-8
  static constexpr float kLimit = 0.5F;
  static constexpr int kCount = 4;
  static constexpr float kTerms[] = {-0.33333144F, 0.13325879F, -0.053045485F, 0.017241476F};
};

template <>
struct TanhTerms<double> {  // |x| <= 0.3, relative error 7.3e-17
  static constexpr double kLimit = 0.3;
  static constexpr int kCount = 7;
  static constexpr double kTerms[] = {-0.333333333333268,    0.13333333331475838,   -0.05396825218087503,
                                      0.02186940684884982,   -0.008861232942637218, 0.0035649895563364046,
                                      -0.0012624623758479706};
};

// cap * tanh(x / cap) where |x| is at most cap * TanhTerms::kLimit; `inverse` is 1 / cap.
template <class V>
inline typename V::Reg softcap_near(typename V::Reg x, typename V::Reg inverse) {
  using T = TanhTerms<typename V::Scalar>;
  const auto ratio = V::mul(x, inverse);
  const auto square = V::mul(ratio, ratio);
  auto y = V::set1(T::kTerms[T::kCount - 1]);
#pragma GCC unroll 8
  for (int i = T::kCount - 2; i >= 0; --i) {
    y = V::fma(y, square, V::set1(T::kTerms[i]));
  }
  return V::fma(V::mul(y, square), x, x);
}

// cap * tanh(x / cap): that polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel, that formula elsewhere.
template <class V>
inline typename V::Reg softcap(typename V::Reg x, typename V::Reg cap, typename V::Reg inverse) {
  using Scalar = typename V::Scalar;
  constexpr double kTwoLog2E = 2.8853900817779268;
  const auto ratio = V::mul(x, inverse);
  const auto magnitude = V::abs(ratio);
  const auto one = V::set1(1);
  // e^-2|x| stays within (0, 1]: no overflow, and -inf and +inf come out as -cap and cap.
  const auto e = exp2<V>(V::mul(magnitude, V::set1(static_cast<Scalar>(-kTwoLog2E))));
  const auto far = V::mul(V::copysign(V::div(V::sub(one, e), V::add(one, e)), ratio), cap);
  return V::select(V::less(magnitude, V::set1(TanhTerms<Scalar>::kLimit)), softcap_near<V>(x, inverse), far);
}

}  // namespace
}  // namespace fastattn
