// The engine for few queries: one vector of lanes, rows dotted with rows, operands read where they lie in their own
// type.
#pragma once

#include "algorithm/engine.h"

namespace fastattn {
namespace {

// How rows of keys are dotted with rows of queries: keys widened to the accumulator's type.
template <class V, class Stored>
struct WideDot {
  using Reg = typename V::Reg;
  using Sums = V;                              // how lanes are added in the end
  using Prob = typename V::Scalar;             // what probabilities are multiplied as
  static constexpr int kElements = V::kWidth;  // of a row, in a vector
  using Read = Stored;                         // what is loaded
  static constexpr bool kScaleQuery = true;
  static constexpr bool kWords = false;        // queries and probabilities become integers
  static constexpr bool kLooksUp = false;      // 8-bit numbers up in tables, with look_up()
  static constexpr bool kPairsValues = false;  // probabilities are multiplied by two keys' values at once
  static FASTATTN_INLINE Reg load(const Stored* row) { return V::load(row); }
  static FASTATTN_INLINE Reg load_partial(const Stored* row, int count) { return V::load_partial(row, count); }
  static FASTATTN_INLINE Reg run(Reg key, Reg query, Reg sum) { return V::fma(key, query, sum); }
  // A vector of a row of queries.
  template <class Source>
  static FASTATTN_INLINE Reg load_query(const Source* row, int count, double factor) {
    return FmaProduct<V>::load_query(row, count, factor);
  }
};

// The softmax and the second product of rows are those of full-width numbers.
template <class V, bool kScaleQuery_>
struct RowProduct : FmaProduct<V> {
  static constexpr bool kScaleQuery = kScaleQuery_;
};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// At once: kQueryRows rows of queries dotted with a tile of keys, kValueRows rows of probabilities with values.
template <class V_, class Source_, class Dot_, int kBlockKeys_, int kQueryRows_, int kValueRows_,
          class Stored_ = Source_>
struct RowEngine {
  using V = V_;
  using Reg = typename V::Reg;
  using Scalar = typename V::Scalar;
  using Source = Source_;
  using Stored = Stored_;            // element type of keys and values; another one is quantised
  using Read = typename Dot_::Read;  // that of the rows that products load; where it is another one, rows are decoded
  using Dot = Dot_;
  using Product = RowProduct<V, Dot::kScaleQuery>;
  using Element = Stored;
  using Prob = Scalar;
  using Rounded = typename Dot::Prob;

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
  static constexpr int kQueryRows = kQueryRows_;
  static constexpr int kValueRows = kValueRows_;
  static constexpr bool kConvert = false;
  static constexpr bool kPacksValue = false;
  static constexpr bool kObserves = false;
  static constexpr bool kDecodes = !kSame<Stored, Read>;
  static constexpr bool kQuantised = !kSame<Source, Stored>;
  static constexpr int kWideRows = kValueRows > 3 && !kQuantised ? 3 : 0;  // of values, with twice as many columns

  static void enter() {}
  static void leave() {}
};

}  // namespace
}  // namespace fastattn
