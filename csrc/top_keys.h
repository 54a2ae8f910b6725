// The keys of largest score out of many, found by keeping more of them than are wanted and dropping the rest now and
// then. Compiled once, for any CPU: kernels of every instruction set call it.
#pragma once

#include <cstdint>

namespace fastattn {

struct ScoredKey {
  double score;
  int64_t key;
};

// Moves the `wanted` best of `count` to the front, in any order, and returns the score of the worst of them: largest
// scores first, of equal ones the lower key. 1 <= wanted <= count; no score is NaN.
double keep_best(ScoredKey* keys, int64_t count, int64_t wanted) noexcept;

// Sorts, the best first.
void sort_best(ScoredKey* keys, int64_t count) noexcept;

}  // namespace fastattn
