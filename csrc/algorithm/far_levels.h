// Rows whose log-sum-exp is so large that its last place is worth something.
//
// A bias of finfo.min over a whole row makes every score and the log-sum-exp the same number; ALiBi's 1e5 leaves no
// room for what is behind the point. P = exp(s - lse) of such a row does not add up to 1, so it is added up once, and
// what it comes to is taken from all of its exponents, if rounding accounts for it: the keys may be a part of those
// that the log-sum-exp is of.
#pragma once

#include "algorithm/gradient_block.h"

namespace fastattn {
namespace {

// Whether rounding the number to its type may change probabilities by 2^-17 of themselves, by 2^-43 in float64.
template <class Scalar>
inline bool lies_far(double lse) {
  constexpr double kFar = sizeof(Scalar) == sizeof(double) ? 1024 : 128;
  const double size = lse < 0 ? -lse : lse;
  return size > kFar && size < __builtin_inf();
}

// The share of a lane's normaliser that belongs to its sink.
template <class E>
inline double sink_share(const BackwardHead<E>& head, const Panel<E>& panel, int64_t i, int lane) {
  const AttentionParams& p = head.p();
  const double sink = p.sinks == nullptr ? -__builtin_inf() : p.sinks[panel.head[lane]];
  if (sink == -__builtin_inf()) {
    return 0;
  }
  const BackwardPlan<E>& plan = head.plan();
  const auto level = static_cast<double>(head.scalars(plan.level_at)[i * E::kLanes + lane]);
  const auto excess = static_cast<double>(head.scalars(plan.excess_at)[i * E::kLanes + lane]);
  return ::exp(sink - (level + panel.beyond[lane]) * plan.rules.to_natural() - excess * kLn2);
}

// Adds up P of the panel's lanes over all keys.
template <class E, int kActive>
FASTATTN_NOINLINE void sum_probabilities(const BackwardHead<E>& head, char* scratch, int64_t i, double* sums) {
  const BackwardPlan<E>& plan = head.plan();
  auto* probs = reinterpret_cast<typename E::Scalar*>(scratch + plan.probs_at);
  for (int64_t block = 0; block < head.p().seqlen_k; block += E::kBlockKeys) {
    GradientBlock<E> g = gradient_block<E>(head, scratch, 0, i, 1, block);
    if (!enter_gradient_block<E>(g)) {
      continue;
    }
    GradientContext<E> context = gradient_context<E>(g, 0);
    for (int64_t key = 0; key < g.block_end - block; key += E::kKeys) {
      const Sight sight = tile_sight<E>(context.scores, block, block + key);
      if (sight == Sight::none) {
        continue;
      }
      context.block_key = key;
      compute_probabilities<E, kActive>(g, context, sight, probs);
      for (int r = 0; r < E::kKeys; ++r) {
        for (int lane = 0; lane < g.panel(0).live; ++lane) {
          sums[lane] += static_cast<double>(probs[r * E::kLanes + lane]);
        }
      }
    }
  }
}

// Sets the excess of such rows of a panel.
template <class E>
void settle_levels(void* opaque, int64_t index, int thread) {
  using Scalar = typename E::Scalar;
  const auto& call = *static_cast<const BackwardCall<E>*>(opaque);
  const BackwardPlan<E>& plan = call.plan;
  const BackwardHead<E> head = backward_head(call, index / plan.head_panels);
  const int64_t i = index % plan.head_panels;
  const Panel<E>& panel = head.panel(i);
  const auto* level = head.scalars(plan.level_at) + i * E::kLanes;
  const auto far = [&](int lane) { return lies_far<Scalar>(static_cast<double>(level[lane]) + panel.beyond[lane]); };
  bool any = false;
  for (int lane = 0; lane < panel.live; ++lane) {
    any |= far(lane);
  }
  if (!any) {
    return;
  }
  const typename E::V::FlushDenormals flush;
  double sums[E::kLanes] = {};
  char* scratch = call.threads + thread * plan.thread_bytes;
  (panel.live > E::kWidth ? sum_probabilities<E, E::kVectors> : sum_probabilities<E, 1>)(head, scratch, i, sums);
  for (int lane = 0; lane < panel.live; ++lane) {
    const double excess = ::log2(sums[lane] + sink_share<E>(head, panel, i, lane));
    const double size = __builtin_fabs(static_cast<double>(level[lane]) + panel.beyond[lane]) * plan.rules.to_log2();
    // Half a place is lost in lse itself, a few in scores of its size.
    constexpr double kLastPlaces = 4 * (sizeof(Scalar) == sizeof(double) ? 0x1p-52 : 0x1p-23);
    if (far(lane) && __builtin_fabs(excess) <= kLastPlaces * size && __builtin_fabs(excess) < __builtin_inf()) {
      head.scalars(plan.excess_at)[i * E::kLanes + lane] = static_cast<Scalar>(excess);
    }
  }
}

}  // namespace
}  // namespace fastattn
