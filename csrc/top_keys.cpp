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

// Up to so many are sorted by insertion into the best so far.
constexpr int64_t kFew = 64;

}  // namespace

double keep_best(ScoredKey* keys, int64_t count, int64_t wanted) noexcept {
  std::nth_element(keys, keys + wanted - 1, keys + count, IsBetter{});
  return keys[wanted - 1].score;
}

int64_t sort_best(ScoredKey* keys, int64_t count, int64_t wanted) noexcept {
  const int64_t sorted = std::min(count, wanted);
  if (count > kFew) {
    std::nth_element(keys, keys + sorted - 1, keys + count, IsBetter{});
    std::sort(keys, keys + sorted, IsBetter{});
    return sorted;
  }
  for (int64_t i = 1; i < count; ++i) {
    const ScoredKey next = keys[i];
    int64_t place = std::min(i, sorted);  // behind the best so far
    for (; place > 0 && IsBetter{}(next, keys[place - 1]); --place) {
      if (place < sorted) {
        keys[place] = keys[place - 1];
      }
    }
    if (place < sorted) {
      keys[place] = next;
    }
  }
  return sorted;
}

}  // namespace fastattn
