// The keys that may be among each lane's strongest: those above a threshold, with their scores, in order. A lane whose
// room is full drops all but the best.
#pragma once

#include "algorithm/engine.h"
#include "top_keys.h"

namespace fastattn {
namespace {

// Candidates beyond the keys that are wanted, at least: they are sorted out when there are so many.
constexpr int64_t kSpareCandidates = 24;
// Up to so many are put in order by comparing each with all, a register at a time; beyond, by sorting.
constexpr int64_t kRankedCandidates = 128;

template <class E>
struct Candidates {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  static constexpr Scalar kLowest = -static_cast<Scalar>(__builtin_inf());

  // A score above the lane's threshold may be among its largest.
  alignas(64) Scalar threshold[E::kLanes];
  int64_t count[E::kLanes];
  int64_t wanted;
  Scalar* scores;    // [kLanes][room]
  int64_t* keys;     // [kLanes][room]
  ScoredKey* pairs;  // [room], for sorting

  // Whole registers.
  static constexpr int64_t room(int64_t wanted) {
    return round_up(wanted + max64(wanted, kSpareCandidates), E::kWidth);
  }
  static constexpr int64_t bytes(int64_t wanted) {
    constexpr auto kOne = static_cast<int64_t>(sizeof(Scalar) + sizeof(int64_t));
    return room(wanted) * (E::kLanes * kOne + static_cast<int64_t>(sizeof(ScoredKey)));
  }

  void place(char* memory, int64_t top_k) {
    wanted = top_k;
    keys = reinterpret_cast<int64_t*>(memory);
    pairs = reinterpret_cast<ScoredKey*>(keys + E::kLanes * room(wanted));
    scores = reinterpret_cast<Scalar*>(pairs + room(wanted));
  }

  void start(int live) {
    for (int lane = 0; lane < E::kLanes; ++lane) {
      threshold[lane] = lane < live ? kLowest : -kLowest;
      count[lane] = 0;
    }
  }

  // Takes from a group of scores, [kGroupKeys][kLanes], those above their lanes' thresholds.
  FASTATTN_NOINLINE void take(const Scalar* group, int64_t first_key) {
    constexpr int kWordKeys = 64 / E::kLanes;  // keys whose lanes are the bits of a word
    for (int from = 0; from < E::kGroupKeys; from += kWordKeys) {
      uint64_t hits = 0;
      for (int r = 0; r < kWordKeys && from + r < E::kGroupKeys; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < E::kVectors; ++v) {
          const auto limits = V::load(threshold + v * E::kWidth);
          const auto above = V::less(limits, V::load(group + (from + r) * E::kLanes + v * E::kWidth));
          hits |= uint64_t{V::bits(above)} << (r * E::kLanes + v * E::kWidth);
        }
      }
      for (; hits != 0; hits &= hits - 1) {
        const int at = from * E::kLanes + __builtin_ctzll(hits);
        add(at % E::kLanes, group[at], first_key + at / E::kLanes);
      }
    }
  }

  // Takes a score above the lane's threshold.
  FASTATTN_INLINE void add(int lane, Scalar score, int64_t key) {
    const int64_t at = lane * room(wanted) + count[lane];
    scores[at] = score;
    keys[at] = key;
    if (FASTATTN_UNLIKELY(++count[lane] == room(wanted))) {
      drop(lane);
    }
  }

  // The lane's strongest, the best first, of equal ones the lower key: returns how many.
  FASTATTN_NOINLINE int64_t best(int lane, int64_t* best_keys, Scalar* best_scores) const {
    const int64_t at = lane * room(wanted);
    const int64_t found = min64(count[lane], wanted);
    if (count[lane] > kRankedCandidates) {
      pair_up(lane);
      sort_best(pairs, count[lane], wanted);
      for (int64_t i = 0; i < found; ++i) {
        best_keys[i] = pairs[i].key;
        best_scores[i] = static_cast<Scalar>(pairs[i].score);
      }
      return found;
    }
    pad(lane);
    for (int64_t i = 0; i < count[lane]; ++i) {
      const int64_t place = rank(scores + at, count[lane], i);
      int64_t beyond_key;  // no branch, which would be mispredicted
      Scalar beyond_score;
      *(place < wanted ? best_keys + place : &beyond_key) = keys[at + i];
      *(place < wanted ? best_scores + place : &beyond_score) = scores[at + i];
    }
    return found;
  }

 private:
  void pad(int lane) const {
    for (int64_t i = count[lane]; i % E::kWidth != 0; ++i) {
      scores[lane * room(wanted) + i] = kLowest;
    }
  }

  // How many of a lane's are before number i.
  static FASTATTN_INLINE int64_t rank(const Scalar* own, int64_t count, int64_t i) {
    const auto score = V::set1(own[i]);
    int64_t place = 0;
    for (int64_t from = 0; from < count; from += E::kWidth) {
      const auto others = V::load(own + from);
      const auto earlier = static_cast<uint32_t>((uint64_t{1} << clamp64(i - from, 0, E::kWidth)) - 1);
      const uint32_t level = V::bits(V::less_equal(score, others)) & earlier;
      place += __builtin_popcount(V::bits(V::less(score, others)) | level);
    }
    return place;
  }

  void pair_up(int lane) const {
    const int64_t at = lane * room(wanted);
    for (int64_t i = 0; i < count[lane]; ++i) {
      pairs[i] = {static_cast<double>(scores[at + i]), keys[at + i]};
    }
  }

  // Drops all but the wanted best; the worst of these is the threshold. The others stay in order.
  FASTATTN_NOINLINE void drop(int lane) {
    pair_up(lane);
    const auto worst = static_cast<Scalar>(keep_best(pairs, count[lane], wanted));
    const int64_t at = lane * room(wanted);
    int64_t level = wanted;  // of the equal ones, those that are not above it
    for (int64_t i = 0; i < count[lane]; ++i) {
      level -= scores[at + i] > worst ? 1 : 0;
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < count[lane]; ++i) {
      const bool stays = scores[at + i] > worst || (scores[at + i] == worst && level-- > 0);
      scores[at + kept] = scores[at + i];
      keys[at + kept] = keys[at + i];
      kept += stays ? 1 : 0;
    }
    count[lane] = kept;
    threshold[lane] = worst;
  }
};

}  // namespace
}  // namespace fastattn
