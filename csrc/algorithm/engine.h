// An Engine says how one element type is computed on one ISA: the Vec, the product that consumes one 32-bit (or double)
// lane of operands, and the tile sizes. Everything else in algorithm/ is written against it.
//
// Scores are computed transposed: a tile holds kKeys keys by kLanes queries, each query in a lane of its own. Maxima
// and sums over keys need no horizontal reduction, a lane's mask is a lane's mask, and rows of different heads can
// stand side by side in one panel.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "algorithm/half.h"
#include "algorithm/math.h"
#include "params.h"

#define FASTATTN_INLINE inline __attribute__((always_inline))
#define FASTATTN_LAMBDA_INLINE __attribute__((always_inline))
#define FASTATTN_NOINLINE __attribute__((noinline))
// What is loaded before stands before what is loaded after, in the program that the compiler makes too.
#define FASTATTN_KEEP_ORDER() __asm__ volatile("" ::: "memory")
#define FASTATTN_UNLIKELY(x) __builtin_expect(static_cast<bool>(x), 0)

namespace fastattn {
namespace {

// How an engine multiplies.
enum class Method {
  broadcast,  // single lanes of keys, and of probabilities, are broadcast over vectors of queries, and of values
  rows,       // for few queries: rows of keys are dotted with rows of queries, and everything is read where it lies
  tiles,      // by a matrix unit
};

// One multiply-add a lane, operands as wide as the accumulator.
template <class V>
struct FmaProduct {
  using Element = typename V::Scalar;     // how operands are stored
  using Prob = typename V::Scalar;        // how probabilities are
  static constexpr int kDepth = 1;        // elements a lane
  static constexpr int kPlanes = 1;       // operands that a probability is split into
  static constexpr double kHeadroom = 0;  // log2 of the probability that the largest score is given
  // The scale goes into the query when it is packed, so that scores come out scaled.
  static constexpr bool kScaleQuery = true;
  static FASTATTN_INLINE typename V::Reg run(typename V::Reg a, typename V::Reg b, typename V::Reg sum) {
    return V::fma(a, b, sum);
  }
  static FASTATTN_INLINE typename V::Reg power(typename V::Reg x) { return exp2<V>(x); }
  // Operands of the second product from the probabilities of `depth` keys.
  static FASTATTN_INLINE void pack_probs(const typename V::Reg (&prob)[1], typename V::Reg (&operand)[1]) {
    operand[0] = prob[0];
  }
  static FASTATTN_INLINE typename V::Reg scale_probabilities(typename V::Reg operand, typename V::Reg scale) {
    return V::mul(operand, scale);
  }
  // `count` lanes of operands from a row of queries.
  template <class Source>
  static FASTATTN_INLINE typename V::Reg load_query(const Source* row, int count, double factor) {
    const auto x = count == V::kWidth ? V::load(row) : V::load_partial(row, count);
    return V::mul(x, V::set1(static_cast<Element>(factor)));
  }
};

// The engine of Method::broadcast.
template <class V_, class Source_, class Product_, int kKeys_, int kVectors_, int kRows_, int kBlockKeys_, bool kFused_>
struct Engine {
  using V = V_;
  using Reg = typename V::Reg;
  using Scalar = typename V::Scalar;
  using Source = Source_;  // element type in the caller's tensors
  using Stored = Source_;  // and where rows of keys and values are read as they are
  using Product = Product_;
  using Element = typename Product::Element;
  using Prob = typename Product::Prob;
  using Rounded = Prob;  // what probabilities are multiplied as

  static constexpr Method kMethod = Method::broadcast;
  static constexpr int kWidth = V::kWidth;
  static constexpr int kDepth = Product::kDepth;
  static constexpr int kPlanes = Product::kPlanes;
  static constexpr int kKeys = kKeys_;        // keys a score tile
  static constexpr int kGroupKeys = kKeys_;   // keys whose maximum is taken at once
  static constexpr int kVectors = kVectors_;  // vectors of queries a score tile
  static constexpr int kLanes = kVectors * kWidth;
  static constexpr int kRows = kRows_;  // queries a tile of the second product; a strip of probabilities is this wide
  static constexpr int kBlockKeys = kBlockKeys_;  // keys between two visits of the output
  static constexpr bool kFused = kFused_;         // softmax on the accumulators, or from a scratch tile
  static constexpr int kDimMultiple = kDepth;     // operand rows are padded to a multiple of this many elements
  static constexpr int kHeadMultiple = kKeys;     // packed heads to a multiple of this many keys
  static constexpr bool kConvert = sizeof(Source) != sizeof(Element);
  static constexpr bool kPacksValue = kConvert || kDepth > 1;
  static constexpr bool kObserves = false;  // see observe.h

  static_assert(kLanes <= 32, "a tile's lanes are the bits of a uint32_t");
  static_assert(kLanes % kRows == 0 && kBlockKeys % kKeys == 0 && kBlockKeys % 8 == 0 && kKeys % kDepth == 0);
  static_assert(sizeof(Scalar) == sizeof(Element) * kDepth);

  // What a thread does before and after a task.
  static void enter() {}
  static void leave() {}
};

// Where the probability of (lane, key) stands, in units of Prob; keys are counted within their block.
template <class E>
constexpr int64_t prob_index(int lane, int64_t key) {
  if (E::kMethod == Method::rows) {
    return int64_t{lane} * E::kBlockKeys + key;
  }
  const int64_t step = int64_t{lane / E::kRows} * (E::kBlockKeys / E::kDepth) + key / E::kDepth;
  return (step * E::kRows + lane % E::kRows) * E::kDepth + key % E::kDepth;
}

// Lanes of operands of one plane of probabilities.
template <class E>
constexpr int64_t kPlaneSize = int64_t{E::kLanes} * E::kBlockKeys / E::kDepth;

// The probability of (lane, key), as the second product sees it.
template <class E>
inline double prob_value(const typename E::Scalar* probs, int lane, int64_t key) {
  double prob = 0;
  for (int plane = 0; plane < E::kPlanes; ++plane) {
    prob +=
        to_scalar(reinterpret_cast<const typename E::Prob*>(probs + plane * kPlaneSize<E>)[prob_index<E>(lane, key)]);
  }
  return prob;
}

// Where the sum of p * v of (lane, column) stands; a matrix unit leaves them transposed.
template <class E>
constexpr int64_t output_index(int lane, int64_t column, int64_t stride) {
  return E::kMethod == Method::tiles ? column * E::kLanes + lane : lane * stride + column;
}

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// The output is rescaled only when a score exceeds the subtracted maximum by this much (log2): probabilities stay
// below 2^8, far from overflow, and on random data the cold path runs a few times a row.
constexpr double kLazyRise = 8.0;
// Where probabilities are rounded the maximum is followed closely and subtracted as it is: the largest probabilities
// are then near 1, which rounds to itself. Sharp softmaxes came out a third less exact with the values above. Costs
// nothing on full, 5% on causal attention (S2048, D64).
constexpr double kRoundedLazyRise = 1.0;
template <class E>
constexpr bool kRoundsProbabilities = sizeof(typename E::Rounded) < sizeof(typename E::Scalar);

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
constexpr int64_t round_down(int64_t x, int64_t step) { return x / step * step; }
constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t clamp64(int64_t x, int64_t low, int64_t high) { return max64(low, min64(x, high)); }

// Element p of a strided tensor.
template <class T>
FASTATTN_INLINE const T* at(const void* base, int64_t index) {
  return static_cast<const T*>(base) + index;
}

template <class E>
inline typename E::Scalar largest_lane(typename E::Reg x) {
  typename E::Scalar lanes[E::kWidth];
  E::V::store(lanes, x);
  typename E::Scalar largest = lanes[0];
  for (const auto lane : lanes) {
    largest = lane > largest ? lane : largest;
  }
  return largest;
}

template <class E>
inline double lane_sum(typename E::Reg x) {
  typename E::Scalar lanes[E::kWidth];
  E::V::store(lanes, x);
  double sum = 0;
  for (const auto lane : lanes) {
    sum += static_cast<double>(lane);
  }
  return sum;
}

// What a group gets in a round of things that are dealt there and back, so that the causal rule leaves all groups with
// as much to do.
inline int64_t dealt(int64_t round, int64_t group, int64_t groups) {
  return round * groups + (round % 2 == 0 ? group : groups - 1 - group);
}

}  // namespace
}  // namespace fastattn
