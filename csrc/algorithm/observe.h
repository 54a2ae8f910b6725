// What a panel notes down while its softmax goes by, for `insight`: each lane's keys of largest score, its sum of
// p * log2(p), and the probabilities themselves, which have to wait for the normaliser before they can be added up over
// the queries. Engines that observe (`Observed<E>`) run the forward as it is, and these hooks in it.
#pragma once

#include "algorithm/engine.h"
#include "top_keys.h"

namespace fastattn {
namespace {

// An engine whose panels note down what they see.
template <class E>
struct Observed : E {
  static constexpr bool kObserves = true;
};

// Candidates beyond the keys that are wanted, at least: they are sorted out when there are so many.
constexpr int64_t kSpareCandidates = 24;

constexpr int64_t candidate_room(int64_t top_k) {
  return top_k + (top_k > kSpareCandidates ? top_k : kSpareCandidates);
}

template <class E, bool kObserves = E::kObserves>
struct Observation {};  // of other engines' panels

template <class E>
struct Observation<E, true> {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  static constexpr int64_t kTiles = E::kBlockKeys / E::kGroupKeys;
  static constexpr Scalar kLowest = -static_cast<Scalar>(__builtin_inf());

  // A score above the lane's threshold may be among its largest.
  alignas(64) Scalar threshold[E::kLanes];
  Scalar log_sum[E::kLanes];    // of p * log2(p) of unnormalised probabilities, over finished key blocks
  Scalar block_log[E::kLanes];  // over the running one
  int64_t count[E::kLanes];     // of candidates
  int64_t top_k;
  ScoredKey* candidates;  // [kLanes][candidate_room]
  // Probabilities under the shift of their time, [key][kLanes]: of all keys from `origin` on, or of the running block.
  Scalar* probs;
  int64_t origin;
  bool keeps_all;
  Scalar* shifts;  // [block][kLanes], counted from `origin`: what the block's probabilities are under
  // The first block that the panel visits is kept, so that its candidates can be told by all of it: they would else be
  // half of all candidates of 2048 keys.
  bool starting;
  Scalar* first_scores;  // [kBlockKeys][kLanes]
  Scalar* first_peaks;   // [kTiles][kLanes]

  void start(int live) {
    for (int lane = 0; lane < E::kLanes; ++lane) {
      threshold[lane] = lane < live ? kLowest : static_cast<Scalar>(__builtin_inf());
      log_sum[lane] = 0;
      block_log[lane] = 0;
      count[lane] = 0;
    }
    starting = true;
  }

  void enter_block() {
    for (Scalar& sum : block_log) {
      sum = 0;
    }
    for (int64_t i = 0; starting && i < kTiles * E::kLanes; ++i) {
      first_peaks[i] = kLowest;
    }
  }

  // `shift` and `limit`: the panel's.
  void leave_block(int64_t block, const Scalar* shift, const Scalar* limit) {
    Scalar* own = block_shifts(block);
    for (int lane = 0; lane < E::kLanes; ++lane) {
      log_sum[lane] += block_log[lane];
      own[lane] = limit[lane] == kLowest ? kLowest : shift[lane];  // of a lane that has seen nothing: any larger one
    }
    if (starting) {
      take_first(block);
    }
  }

  Scalar* block_probs(int64_t block) const { return keeps_all ? probs + (block - origin) * E::kLanes : probs; }
  Scalar* block_shifts(int64_t block) const { return shifts + (block - origin) / E::kBlockKeys * E::kLanes; }

  // A lane's shift rises by `lift` (log2), and what was summed under the old one falls by `scale`. `sums`: of
  // probabilities, of finished blocks and of the running one.
  void raise(int lane, Scalar scale, double lift, const Scalar (&sums)[2], Scalar* block, int64_t begin, int64_t end) {
    const auto fall = [&](Scalar log, Scalar sum) {  // where the scale is 0 the lift may be beyond all numbers
      return scale == 0 ? Scalar{0} : static_cast<Scalar>(scale * (log - lift * sum));
    };
    log_sum[lane] = fall(log_sum[lane], sums[0]);
    block_log[lane] = fall(block_log[lane], sums[1]);
    for (int64_t key = begin; key < end; ++key) {
      block[key * E::kLanes + lane] *= scale;
    }
  }

  // Takes from a group of scores, [kGroupKeys][kLanes], those above their lanes' thresholds.
  FASTATTN_NOINLINE void take(const Scalar* scores, int64_t first_key) {
    for (int r = 0; r < E::kGroupKeys; ++r) {
      for (int v = 0; v < E::kVectors; ++v) {
        const auto limits = V::load(threshold + v * E::kWidth);
        uint32_t lanes = V::bits(V::less(limits, V::load(scores + r * E::kLanes + v * E::kWidth)));
        for (; lanes != 0; lanes &= lanes - 1) {
          const int lane = v * E::kWidth + __builtin_ctz(lanes);
          add(lane, scores[r * E::kLanes + lane], first_key + r);
        }
      }
    }
  }

  void add(int lane, Scalar score, int64_t key) {
    const int64_t room = candidate_room(top_k);
    ScoredKey* own = candidates + lane * room;
    own[count[lane]++] = {static_cast<double>(score), key};
    if (count[lane] == room) {
      count[lane] = top_k;
      threshold[lane] = static_cast<Scalar>(keep_best(own, room, top_k));
    }
  }

  // The first block is complete: as many of its groups as keys are wanted have a peak that is not below the threshold,
  // so the keys of its largest scores are above it.
  FASTATTN_NOINLINE void take_first(int64_t block) {
    starting = false;
    if (top_k <= kTiles) {
      for (int v = 0; v < E::kVectors; ++v) {
        seed(v);
      }
    }
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      bool any = false;
      for (int v = 0; v < E::kVectors; ++v) {
        const int64_t at = v * E::kWidth;
        any |= V::any(V::less(V::load(threshold + at), V::load(first_peaks + tile * E::kLanes + at)));
      }
      if (any) {
        take(first_scores + tile * E::kGroupKeys * E::kLanes, block + tile * E::kGroupKeys);
      }
    }
  }

 private:
  // Thresholds just below the top_k-th largest of the first block's peaks, by insertion.
  void seed(int v) {
    alignas(64) Scalar best[kTiles * E::kWidth];
    for (int64_t i = 0; i < top_k * E::kWidth; ++i) {
      best[i] = kLowest;
    }
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      auto peak = V::load(first_peaks + tile * E::kLanes + v * E::kWidth);
      for (int64_t place = 0; place < top_k; ++place) {
        const auto here = V::load(best + place * E::kWidth);
        V::store(best + place * E::kWidth, V::max(peak, here));
        peak = V::min(peak, here);
      }
    }
    for (int i = 0; i < E::kWidth; ++i) {
      constexpr auto kPart = static_cast<Scalar>(sizeof(Scalar) == sizeof(double) ? 1e-14 : 1e-6);
      const Scalar last = best[(top_k - 1) * E::kWidth + i];
      const Scalar size = last < 0 ? -last : last;
      Scalar& limit = threshold[v * E::kWidth + i];
      if (limit == kLowest && size < -kLowest) {
        limit = last - size * kPart - static_cast<Scalar>(1e-30);
      }
    }
  }
};

}  // namespace
}  // namespace fastattn
