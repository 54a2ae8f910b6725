// Sums below the smallest normal number become 0 while a task runs.
#pragma once

#include <xmmintrin.h>

namespace fastattn {
namespace {

// Far keys have probabilities near 2^-126, whose products with values are no normal numbers. Intel CPUs take a hundred
// times as long for such a result: steep ALiBi slopes ran at half the speed. Nothing is lost that reaches a result of
// normal size. The caller's mode, and its flags, come back at the end.
class DenormalsFlushed {
 public:
  DenormalsFlushed() : state_(_mm_getcsr()) { _mm_setcsr(state_ | _MM_FLUSH_ZERO_ON); }
  ~DenormalsFlushed() { _mm_setcsr(state_); }
  DenormalsFlushed(const DenormalsFlushed&) = delete;
  DenormalsFlushed& operator=(const DenormalsFlushed&) = delete;

 private:
  unsigned state_;
};

}  // namespace
}  // namespace fastattn
