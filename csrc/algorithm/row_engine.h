// The engine for few queries: one vector of lanes, rows dotted with rows, operands read where they lie in their own
// type.
#pragma once

#include "algorithm/engine.h"

namespace fastattn {
namespace {

template <class V_, class Source_, int kBlockKeys_, int kLanesAtOnce_>
struct RowEngine {
  using V = V_;
  using Reg = typename V::Reg;
  using Scalar = typename V::Scalar;
  using Source = Source_;
  using Product = FmaProduct<V>;
  using Element = Source;
  using Prob = Scalar;

  static constexpr Method kMethod = Method::rows;
  static constexpr int kWidth = V::kWidth;
  static constexpr int kDepth = 1;
  static constexpr int kPlanes = 1;
  static constexpr int kKeys = 8;
  static constexpr int kGroupKeys = 8;
  static constexpr int kVectors = 1;
  static constexpr int kLanes = kWidth;
  static constexpr int kRows = 1;
  static constexpr int kBlockKeys = kBlockKeys_;
  static constexpr bool kFused = false;
  static_assert(kBlockKeys % kWidth == 0 && kBlockKeys % kKeys == 0);
  static constexpr int kDimMultiple = 1;
  static constexpr int kHeadMultiple = kKeys;
  static constexpr int kLanesAtOnce = kLanesAtOnce_;  // queries dotted with a key while it is in registers
  static constexpr bool kConvert = false;
  static constexpr bool kPacksValue = false;

  static void enter() {}
  static void leave() {}
};

}  // namespace
}  // namespace fastattn
