// How one backward call is cut, and what its scratch holds.
#pragma once

#include "algorithm/dense_block.h"
#include "algorithm/gradient_tile.h"
#include "algorithm/plan.h"

namespace fastattn {
namespace {

// Panels that share a block of keys while P and dS of both are in cache, at most.
constexpr int kGradientPanels = 8;

// Keys from which a head's key blocks fall into two groups, and on in proportion: groups can run at once, each with a
// dQ of its own to be added up. At 512 keys that addition is a hundredth of the work.
constexpr int64_t kKeysOfGroup = 512;
constexpr int64_t kMaxKeyGroups = 8;

// Queries by keys of a key/value head up to which one thread goes through the head from end to end, so that what it
// packs is still in its cache: a gain of some points at 512 by 512, none that could be told at 2048 by 2048. And a call
// can be left between two tasks only.
constexpr double kWholeHead = 1024.0 * 1024.0;
// Heads for each thread from which it does not matter if some threads find one less than others.
constexpr int64_t kManyHeads = 8;

template <class E>
struct BackwardPlan {
  ScoreRules<E> rules;
  double query_factor;
  bool general;   // tiles have more to do than the fast one does: gradient_extras
  int64_t spans;  // stretches of rows a key/value head falls into: one a query head, or one for all
  int64_t span_rows;
  int64_t span_panels;
  bool mixed;           // a panel may hold rows of several heads
  int64_t head_panels;  // of all spans
  int panels;           // of a query block
  int64_t blocks;       // of keys
  int64_t key_groups;
  int64_t wave;      // key/value heads at once
  bool whole_heads;  // each thread goes through one head from end to end
  int threads;
  // Operands are copied: rows of keys and values, whose lanes are broadcast, and rows of queries, dO and keys as steps
  // of the second products, whole vectors side by side.
  bool pack_key, pack_value, pack_query, pack_grad_out, pack_steps;
  bool clean_key;     // steps of keys leave out those that are not finite
  int64_t key_lanes;  // lanes of a copied row
  int64_t value_lanes;
  int64_t value_steps;  // lanes of a row of values that hold numbers
  int64_t head_dim;     // padded to whole vectors, as the next
  int64_t value_dim;
  // byte offsets of a head's scratch
  int64_t panels_at, query_at, grad_out_at, level_at, excess_at, delta_at, query_rows_at, grad_out_rows_at, key_rows_at,
      key_steps_at, value_rows_at, partial_at, slopes_at, head_bytes;
  // and of a thread's
  int64_t local_at, probs_at, grads_at, query_grads_at, tile_probs_at, tile_grads_at, raw_at, extra_at, kept_at,
      dense_at, lane_slopes_at, grad_key_at, grad_value_at, dense_bytes, thread_bytes;
};

// What scratch that 64 bits cannot count comes to: nobody has as much, and asking for it is an error.
constexpr int64_t kEndlessScratch = int64_t{1} << 60;

struct ScratchLayout {
  int64_t bytes = 0;

  // Room for a product of sizes. Where strides are 0, rows may be more than could be stored.
  template <class... Sizes>
  int64_t take(Sizes... sizes) {
    const int64_t start = bytes;
    int64_t size = 1;
    const bool counted = (!__builtin_mul_overflow(size, static_cast<int64_t>(sizes), &size) && ...);
    bytes = counted && size < kEndlessScratch - bytes ? bytes + round_up(size, kScratchAlign) : kEndlessScratch;
    return start;
  }
};

inline int64_t common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

template <class E>
inline void plan_head_scratch(BackwardPlan<E>& plan, const BackwardParams& b) {
  const AttentionParams& p = b.forward;
  constexpr auto kScalar = static_cast<int64_t>(sizeof(typename E::Scalar));
  const int64_t lanes = plan.head_panels * E::kLanes;
  const int64_t steps = lanes / E::kDepth;
  const int64_t keys = round_up(p.seqlen_k, E::kBlockKeys);
  ScratchLayout head;
  plan.panels_at = head.take(plan.head_panels, sizeof(Panel<E>));
  plan.query_at = head.take(lanes, plan.rules.steps, kScalar);
  plan.grad_out_at = head.take(lanes, plan.value_steps, kScalar);
  plan.level_at = head.take(lanes, kScalar);
  plan.excess_at = head.take(lanes, kScalar);
  plan.delta_at = head.take(lanes, kScalar);
  plan.query_rows_at = head.take(plan.pack_query ? steps : 0, plan.head_dim, kScalar);
  plan.grad_out_rows_at = head.take(plan.pack_grad_out ? steps : 0, plan.value_dim, kScalar);
  plan.key_rows_at = head.take(plan.pack_key ? keys : 0, plan.key_lanes, kScalar);
  plan.key_steps_at = head.take(plan.pack_steps ? keys / E::kDepth : 0, plan.head_dim, kScalar);
  plan.value_rows_at = head.take(plan.pack_value ? keys : 0, plan.value_lanes, kScalar);
  plan.partial_at = head.take(b.grad_query != nullptr ? lanes : 0, plan.key_groups, plan.head_dim, kScalar);
  plan.slopes_at = head.take(p.query_heads / p.kv_heads, plan.key_groups, sizeof(double));
  plan.head_bytes = head.bytes;
}

template <class E>
inline void plan_thread_scratch(BackwardPlan<E>& plan, const BackwardParams& b) {
  constexpr auto kScalar = static_cast<int64_t>(sizeof(typename E::Scalar));
  constexpr int64_t kTile = int64_t{E::kKeys} * E::kLanes * kScalar;
  ScratchLayout thread;
  plan.local_at = thread.take(plan.panels * static_cast<int64_t>(sizeof(Panel<E>)));
  const int64_t coefficients = plan.panels * int64_t{E::kBlockKeys} * kKeyLanes<E> * kScalar;
  plan.probs_at = thread.take(coefficients);
  plan.grads_at = thread.take(coefficients);
  plan.query_grads_at = E::kDepth == 1 ? plan.grads_at : thread.take(coefficients);
  plan.tile_probs_at = thread.take(E::kDepth == 1 ? 0 : kTile);
  plan.tile_grads_at = thread.take(E::kDepth == 1 ? 0 : kTile);
  plan.raw_at = thread.take(kTile);
  plan.extra_at = thread.take(kTile);
  plan.kept_at = thread.take(kTile);
  plan.dense_bytes = round_up(DenseRoom<E>::bytes(b.forward, E::kBlockKeys), kScratchAlign);
  plan.dense_at = thread.take(plan.panels * plan.dense_bytes);
  plan.lane_slopes_at = thread.take(E::kLanes * static_cast<int64_t>(sizeof(double)));
  plan.grad_key_at = thread.take(int64_t{E::kBlockKeys} * plan.head_dim * kScalar);
  plan.grad_value_at = thread.take(int64_t{E::kBlockKeys} * plan.value_dim * kScalar);
  plan.thread_bytes = round_up(thread.bytes, 4096);
}

// Whether one thread may go through a head from end to end.
template <class E>
inline bool fits_thread(const BackwardPlan<E>& plan, const BackwardParams& b) {
  const AttentionParams& p = b.forward;
  const int64_t group = p.query_heads / p.kv_heads;
  const double pairs = static_cast<double>(group) * static_cast<double>(p.seqlen_q) * static_cast<double>(p.seqlen_k);
  return b.grad_bias == nullptr && pairs <= kWholeHead && plan.head_bytes <= kPackedBudget / plan.threads;
}

// `clean`: some row of queries, keys or dO is not finite, and some pair of rows and keys is hidden.
template <class E>
inline BackwardPlan<E> plan_backward(const BackwardParams& b, bool clean) {
  const AttentionParams& p = b.forward;
  BackwardPlan<E> plan{};
  plan.rules = score_rules<E>(p);
  plan.query_factor = query_factor<E>(p);
  plan.general = p.softcap > 0 || p.dropout.threshold > 0 || b.grad_weights != nullptr || b.grad_slopes != nullptr;
  const int64_t group = p.query_heads / p.kv_heads;
  const bool together = p.seqlen_q < E::kLanes;
  plan.spans = together ? 1 : group;
  plan.span_rows = together ? group * p.seqlen_q : p.seqlen_q;
  plan.span_panels = (plan.span_rows + E::kLanes - 1) / E::kLanes;
  plan.head_panels = plan.spans * plan.span_panels;
  plan.panels = static_cast<int>(min64(kGradientPanels, plan.span_panels));
  plan.blocks = (p.seqlen_k + E::kBlockKeys - 1) / E::kBlockKeys;
  plan.key_groups = clamp64(p.seqlen_k / kKeysOfGroup, 1, kMaxKeyGroups);
  plan.head_dim = round_up(p.head_dim, E::kWidth);
  plan.value_dim = round_up(p.value_dim, E::kWidth);
  plan.key_lanes = E::kDepth == 1 ? plan.head_dim : plan.rules.steps;
  plan.value_steps = round_up(p.value_dim, E::kDepth) / E::kDepth;
  plan.value_lanes = E::kDepth == 1 ? plan.value_dim : plan.value_steps;
  plan.mixed = together && group > 1;
  const auto scattered = [&](const int64_t* strides, int64_t columns, int64_t multiple) {
    return E::kConvert || strides[3] != 1 || columns % multiple != 0;
  };
  const bool pairs = E::kDepth > 1;
  plan.pack_query = pairs || clean || plan.mixed || scattered(p.query_strides, p.head_dim, E::kWidth);
  plan.pack_grad_out = pairs || clean || plan.mixed || scattered(b.grad_out_strides, p.value_dim, E::kWidth);
  const bool tail = p.seqlen_k % E::kKeys != 0;  // the last tile reaches past the tensor
  plan.pack_key = tail || scattered(p.key_strides, p.head_dim, pairs ? E::kDepth : E::kWidth);
  plan.pack_value = tail || scattered(p.value_strides, p.value_dim, pairs ? E::kDepth : E::kWidth);
  plan.clean_key = clean;
  plan.pack_steps = pairs || clean;
  plan_head_scratch<E>(plan, b);
  plan_thread_scratch<E>(plan, b);
  const int64_t heads = p.batch * p.kv_heads;
  const int64_t parts = max64(plan.key_groups, plan.head_panels);
  plan.threads = effective_threads(b.grad_bias != nullptr ? INT64_MAX : heads * parts,
                                   worthwhile_threads(p, heads * plan.head_panels));
  // Few heads at once, that what is packed for them stays in cache: as many as give each thread two groups of keys.
  const int64_t balanced = 2 * plan.threads / common_divisor(plan.threads, plan.key_groups);
  plan.wave = clamp64(kPackedBudget / plan.head_bytes, 1, min64(heads, balanced));
  plan.whole_heads = fits_thread(plan, b) && (heads % plan.threads == 0 || heads >= kManyHeads * int64_t{plan.threads});
  return plan;
}

}  // namespace
}  // namespace fastattn
