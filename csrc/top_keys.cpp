#include "top_keys.h"

#include <algorithm>

namespace fastattn {
namespace {

// An object and no function, which would be called through a pointer.
struct IsBetter {
  bool operator()(const ScoredKey& a, const ScoredKey& b) const {
    return a.score > b.score || (a.score == b.score && a.key < b.key);
  }
};

}  // namespace

double keep_best(ScoredKey* keys, int64_t count, int64_t wanted) noexcept {
  std::nth_element(keys, keys + wanted - 1, keys + count, IsBetter{});
  return keys[wanted - 1].score;
}

int64_t sort_best(ScoredKey* keys, int64_t count, int64_t wanted) noexcept {
  const int64_t sorted = std::min(count, wanted);
  if (sorted > 0) {
    keep_best(keys, count, sorted);
  }
  std::sort(keys, keys + sorted, IsBetter{});
  return sorted;
}

}  // namespace fastattn
