// The multiply-add ceiling of a Vec: independent sums, nothing else.
#pragma once

#include "algorithm/engine.h"

namespace fastattn {
namespace {

// Enough sums to cover the latency of two multiply-add units on every CPU known.
constexpr int kPeakSums = 12;

// `step(sum, x)` performs one instruction in asm, so that the compiler neither merges nor removes it.
template <class V, class Step>
FASTATTN_INLINE double run_peak(int64_t rounds, int operations_a_lane, Step step) {
  typename V::Reg sum[kPeakSums];
  const typename V::Reg x = V::set1(1);
#pragma GCC unroll 12
  for (int i = 0; i < kPeakSums; ++i) {
    sum[i] = x;
  }
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakSums; ++i) {
      step(sum[i], x);
    }
  }
  return static_cast<double>(rounds) * kPeakSums * V::kWidth * operations_a_lane;
}

}  // namespace
}  // namespace fastattn
