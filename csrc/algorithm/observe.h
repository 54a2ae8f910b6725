// What a panel notes down while its softmax goes by, for `insight`: each lane's keys of largest score, its sum of
// p * log2(p), and the probabilities themselves, which have to wait for the normaliser before they can be added up over
// the queries. Engines that observe (`Observed<E>`) run the forward as it is, and these hooks in it.
#pragma once

#include "algorithm/candidates.h"

namespace fastattn {
namespace {

// An engine whose panels note down what they see.
template <class E>
struct Observed : E {
  static constexpr bool kObserves = true;
};

// Blocks whose scores a panel keeps at its start, see Observation::take_first.
constexpr int64_t kFirstBlocks = 4;

template <class E, bool kObserves = E::kObserves>
struct Observation {};  // of other engines' panels

template <class E>
struct Observation<E, true> : Candidates<E> {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  static constexpr int64_t kFirstKeys = kFirstBlocks * E::kBlockKeys;
  static constexpr int64_t kFirstGroups = kFirstKeys / E::kGroupKeys;
  using Candidates<E>::kLowest;
  using Candidates<E>::threshold;

  alignas(64) Scalar log_sum[E::kLanes];  // of p * log2(p) of unnormalised probabilities, over finished key blocks
  Scalar block_log[E::kLanes];            // over the running one
  // Probabilities, [key][kLanes], and the shifts that they are under, [group of keys][kLanes]: of all keys from
  // `origin` on, or of the running block.
  Scalar* probs;
  Scalar* shifts;
  int64_t origin;
  bool keeps_all;
  bool starting;         // the panel is in its first blocks
  Scalar* first_scores;  // [kFirstKeys][kLanes]
  Scalar* first_peaks;   // [kFirstGroups][kLanes], the largest of each group

  void start(int live) {
    Candidates<E>::start(live);
    for (int lane = 0; lane < E::kLanes; ++lane) {
      log_sum[lane] = 0;
      block_log[lane] = 0;
    }
    starting = true;
  }

  void enter_block(int64_t block) {
    for (Scalar& sum : block_log) {
      sum = 0;
    }
    if (starting && block - origin < kFirstKeys) {
      Scalar* peaks = group_peaks(block);
      for (int64_t i = 0; i < E::kBlockKeys / E::kGroupKeys * E::kLanes; ++i) {
        peaks[i] = kLowest;
      }
    }
  }

  void leave_block(int64_t block) {
    for (int lane = 0; lane < E::kLanes; ++lane) {
      log_sum[lane] += block_log[lane];
    }
    if (starting && block + E::kBlockKeys - origin >= kFirstKeys) {
      take_first(kFirstGroups);
    }
  }

  // After the last block, of panels that have seen few.
  void finish(int64_t end) {
    if (starting) {
      take_first(min64(round_up(end - origin, E::kBlockKeys), kFirstKeys) / E::kGroupKeys);
    }
  }

  Scalar* block_probs(int64_t block) const { return keeps_all ? probs + (block - origin) * E::kLanes : probs; }
  Scalar* group_shifts(int64_t block, int64_t block_key) const {
    return shifts + ((keeps_all ? block - origin : 0) + block_key) / E::kGroupKeys * E::kLanes;
  }
  // No lane sees the group. `shift`: the panel's.
  void skip_group(int64_t block, int64_t block_key, const Scalar* shift) {
    memset(block_probs(block) + block_key * E::kLanes, 0, sizeof(Scalar) * E::kGroupKeys * E::kLanes);
    memcpy(group_shifts(block, block_key), shift, sizeof threshold);
  }
  Scalar* group_scores(int64_t key) const { return first_scores + (key - origin) * E::kLanes; }
  Scalar* group_peaks(int64_t key) const { return first_peaks + (key - origin) / E::kGroupKeys * E::kLanes; }

  // A lane's shift rises by `lift` (log2), and what was summed under the old one falls by `scale`. `sums`: of
  // probabilities, of finished blocks and of the running one.
  void raise(int lane, Scalar scale, double lift, const Scalar (&sums)[2]) {
    const auto fall = [&](Scalar log, Scalar sum) {  // where the scale is 0 the lift may be beyond all numbers
      return scale == 0 ? Scalar{0} : static_cast<Scalar>(scale * (log - lift * sum));
    };
    log_sum[lane] = fall(log_sum[lane], sums[0]);
    block_log[lane] = fall(block_log[lane], sums[1]);
  }

 private:
  // Of the first blocks all scores are there: as many groups as keys are wanted have a peak that is not below the
  // last of the wanted peak, so no key below it is wanted. Else these keys would have most of the candidates.
  FASTATTN_NOINLINE void take_first(int64_t groups) {
    starting = false;
    for (int v = 0; this->wanted <= groups && v < E::kVectors; ++v) {
      seed(v, groups);
    }
    for (int64_t group = 0; group < groups; ++group) {
      bool any = false;
      for (int v = 0; v < E::kVectors; ++v) {
        const int64_t at = v * E::kWidth;
        any |= V::any(V::less(V::load(threshold + at), V::load(first_peaks + group * E::kLanes + at)));
      }
      if (any) {
        this->take(first_scores + group * E::kGroupKeys * E::kLanes, origin + group * E::kGroupKeys);
      }
    }
  }

  // Thresholds just below the top_k-th largest of the peaks, by insertion.
  void seed(int v, int64_t groups) {
    alignas(64) Scalar best[kFirstGroups * E::kWidth];
    for (int64_t i = 0; i < this->wanted * E::kWidth; ++i) {
      best[i] = kLowest;
    }
    const Scalar* last = best + (this->wanted - 1) * E::kWidth;
    for (int64_t group = 0; group < groups; ++group) {
      auto peak = V::load(first_peaks + group * E::kLanes + v * E::kWidth);
      if (!V::any(V::less(V::load(last), peak))) {
        continue;
      }
      for (int64_t place = 0; place < this->wanted; ++place) {
        const auto here = V::load(best + place * E::kWidth);
        V::store(best + place * E::kWidth, V::max(peak, here));
        peak = V::min(peak, here);
      }
    }
    for (int i = 0; i < E::kWidth; ++i) {
      constexpr auto kPart = static_cast<Scalar>(sizeof(Scalar) == sizeof(double) ? 1e-14 : 1e-6);
      const Scalar size = last[i] < 0 ? -last[i] : last[i];
      Scalar& limit = threshold[v * E::kWidth + i];
      if (limit == kLowest && size < -kLowest) {
        limit = last[i] - size * kPart - static_cast<Scalar>(1e-30);
      }
    }
  }
};

}  // namespace
}  // namespace fastattn
