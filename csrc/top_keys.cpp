#include "top_keys.h"

#include <algorithm>

namespace fastattn {
namespace {

bool is_better(const ScoredKey& a, const ScoredKey& b) {
  return a.score > b.score || (a.score == b.score && a.key < b.key);
}

}  // namespace

double keep_best(ScoredKey* keys, int64_t count, int64_t wanted) noexcept {
  std::nth_element(keys, keys + wanted - 1, keys + count, is_better);
  return keys[wanted - 1].score;
}

void sort_best(ScoredKey* keys, int64_t count) noexcept { std::sort(keys, keys + count, is_better); }

}  // namespace fastattn
