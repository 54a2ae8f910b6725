// One way in which a tier computes 2^x, as the exhaustive test runs it. Plain data: what one tier's object file shares
// with the driver may hold no code that the linker could take from another.
#pragma once

#include <cstdint>

namespace exp2_test {

constexpr int kChunk = 4096;  // consecutive bit patterns, so that a chunk is of one sign and one exponent

enum class Range {
  normal,  // [-126, 128) in float32: within `bound` of the exact power
  below,   // 0, or within the smallest normal number of the exact power
  above,   // +inf
  nan,     // NaN
};

struct Worst {
  double error;   // in units of the last place, or relative where the degree is bfloat16's
  int64_t wrong;  // results out of bounds
  double first;   // an argument of such a result
};

struct Variant {
  const char* name;
  bool relative;  // its error is counted relatively
  double bound;
  // Folds results for x[0, kChunk) into `worst`. `exact` holds the powers in double precision.
  void (*check)(const float* x, const double* exact, Range range, Worst* worst);
  // y[i] = 2^x[i]
  void (*compute)(const float* x, float* y);
};

struct Tier {
  const char* name;
  Variant variants[2];
  int count;
  void (*compute_double)(const double* x, double* y);  // kChunk of them; null where another tier's are used
};

}  // namespace exp2_test
