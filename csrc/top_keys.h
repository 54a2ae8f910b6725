// The keys of largest score out of many, found by keeping more of them than are wanted and dropping the rest now and
// then. Compiled once, for any CPU: kernels of every instruction set call it.
#pragma once

#include <cstdint>

namespace fastattn {

struct ScoredKey {
  double score;
  int64_t key;
};

// Of scored keys, none of them NaN, the best are those of largest score; of equal ones the lower key.

// Moves the `wanted` best of `count` to the front, in any order, and returns the score of the worst of them.
// 1 <= wanted <= count.
double keep_best(ScoredKey* keys, int64_t count, int64_t wanted) noexcept;

// Moves the `wanted` best of `count`, or all if there are fewer, to the front, the best first; returns how many.
int64_t sort_best(ScoredKey* keys, int64_t count, int64_t wanted) noexcept;

}  // namespace fastattn
