// Which probabilities dropout keeps: Philox 4x32-10, whose numbers depend on their place and a key alone. The same as
// fastattn/philox.py, where the counter is described.
#pragma once

#include <cstdint>

#include "params.h"

namespace fastattn {
namespace {

// Four random words for each of kCount counters, in place. [word][counter]
template <int kCount>
inline void philox(uint32_t (&counter)[4][kCount], uint64_t seed) {
  auto low = static_cast<uint32_t>(seed);
  auto high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCount; ++i) {  // the compiler makes vectors of this
      const uint64_t first = uint64_t{0xD2511F53} * counter[0][i];
      const uint64_t second = uint64_t{0xCD9E8D57} * counter[2][i];
      counter[0][i] = static_cast<uint32_t>(second >> 32) ^ counter[1][i] ^ low;
      counter[1][i] = static_cast<uint32_t>(second);
      counter[2][i] = static_cast<uint32_t>(first >> 32) ^ counter[3][i] ^ high;
      counter[3][i] = static_cast<uint32_t>(first);
    }
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
}

// What a probability is multiplied by, given its random word.
inline double kept(const Dropout& dropout, uint32_t word) { return word >= dropout.threshold ? dropout.scale : 0; }

}  // namespace
}  // namespace fastattn
