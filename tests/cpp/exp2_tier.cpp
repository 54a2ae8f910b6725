// Compiled once a tier, with the tier's flags, its vec.h and its name (FASTATTN_TIER): the powers that its kernels
// take.
#include "exp2_tier.h"

#include <cstring>

#include FASTATTN_VEC_HEADER
#include "algorithm/math.h"

namespace exp2_test {
namespace {

using fastattn::Precision;
using fastattn::VecF32;
using fastattn::VecF64;

constexpr double kUlps = 2;
constexpr double kBfloat16Relative = 1e-4;

struct Full {
  static VecF32::Reg run(VecF32::Reg x) { return fastattn::exp2<VecF32>(x); }
};

#if FASTATTN_EXP2_OWN == 1
constexpr char kOwnName[] = "exp2, bfloat16";
constexpr bool kOwnRelative = true;
struct Own {
  static VecF32::Reg run(VecF32::Reg x) { return fastattn::exp2<VecF32, Precision::bfloat16>(x); }
};
#elif FASTATTN_EXP2_OWN == 2
constexpr char kOwnName[] = "exp2_by_scale, bfloat16";
constexpr bool kOwnRelative = true;
struct Own {
  static VecF32::Reg run(VecF32::Reg x) { return fastattn::exp2_by_scale<VecF32, Precision::bfloat16>(x); }
};
#elif FASTATTN_EXP2_OWN == 3
constexpr char kOwnName[] = "exp2_by_scale";
constexpr bool kOwnRelative = false;
struct Own {
  static VecF32::Reg run(VecF32::Reg x) { return fastattn::exp2_by_scale<VecF32, Precision::full>(x); }
};
#endif

template <class Power>
void compute(const float* x, float* y) {
  for (int i = 0; i < kChunk; i += VecF32::kWidth) {
    VecF32::store(y + i, Power::run(VecF32::load(x + i)));
  }
}

void compute_double(const double* x, double* y) {
  for (int i = 0; i < kChunk; i += VecF64::kWidth) {
    VecF64::store(y + i, fastattn::exp2<VecF64>(VecF64::load(x + i)));
  }
}

// The power of two at or below a positive number.
inline double magnitude(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= 0x7ff0000000000000ULL;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Errors of a chunk in units of what the range allows 1 of: loops without a branch, for the compiler to vectorise.
template <bool relative>
void measure(const float* y, const double* exact, Range range, double* errors) {
  for (int i = 0; i < kChunk; ++i) {
    const double error = __builtin_fabs(y[i] - exact[i]);
    const double unit = relative ? exact[i] : magnitude(exact[i]) * 0x1p-23;
    errors[i] = range == Range::normal ? error / unit : y[i] < 0 ? 2 : error * 0x1p126;
  }
}

template <class Power, bool relative>
void check(const float* x, const double* exact, Range range, Worst* worst) {
  alignas(64) float y[kChunk];
  alignas(64) double errors[kChunk];
  compute<Power>(x, y);
  double bound = range == Range::normal ? (relative ? kBfloat16Relative : kUlps) : 1;
  if (range == Range::normal || range == Range::below) {
    measure<relative>(y, exact, range, errors);
  } else {
    for (int i = 0; i < kChunk; ++i) {
      // An exponential too low by a little reaches infinity a little late.
      const bool high = y[i] == __builtin_inff() || (relative && y[i] >= 0x1p128 * (1 - kBfloat16Relative));
      const bool right = range == Range::nan ? y[i] != y[i] : high;
      errors[i] = right ? 0 : 1;
    }
    bound = 0;
  }
  double highest = 0;
  int wrong = 0;
  for (int i = 0; i < kChunk; ++i) {
    highest = errors[i] > highest ? errors[i] : highest;
    wrong += !(errors[i] <= bound);
  }
  if (range == Range::normal && highest > worst->error) {
    worst->error = highest;
  }
  for (int i = 0; wrong != 0 && i < kChunk && worst->wrong == 0; ++i) {
    if (!(errors[i] <= bound)) {
      worst->first = x[i];
      break;
    }
  }
  worst->wrong += wrong;
}

}  // namespace

#define EXP2_JOIN_(a, b) a##b
#define EXP2_JOIN(a, b) EXP2_JOIN_(a, b)
#define EXP2_TEXT_(a) #a
#define EXP2_TEXT(a) EXP2_TEXT_(a)

extern const Tier EXP2_JOIN(tier_, FASTATTN_TIER);
const Tier EXP2_JOIN(tier_, FASTATTN_TIER) = {
    EXP2_TEXT(FASTATTN_TIER),
    {
        {"exp2", false, kUlps, check<Full, false>, compute<Full>},
#if FASTATTN_EXP2_OWN
        {kOwnName, kOwnRelative, kOwnRelative ? kBfloat16Relative : kUlps, check<Own, kOwnRelative>, compute<Own>},
#endif
    },
    FASTATTN_EXP2_OWN ? 2 : 1,
    compute_double,
};

}  // namespace exp2_test
