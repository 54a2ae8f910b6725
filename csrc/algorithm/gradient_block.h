// A block of queries over a block of keys: P and dS tile by tile, and what they add to dQ, dK and dV.
#pragma once

#include "algorithm/backward_head.h"

namespace fastattn {
namespace {

// A block of queries over a block of keys.
template <class E>
struct GradientBlock {
  using Scalar = typename E::Scalar;
  const BackwardHead<E>& head;
  char* scratch;  // the thread's
  int64_t group;  // of keys
  int64_t span;
  int64_t first_panel;  // counted in the head
  int panels;
  int64_t block;      // its first key
  int64_t block_end;  // past its last
  bool of_scores;     // dS of the scores as the softmax sees them, for the bias; else of the products before softcap
  DenseBlock<E> dense[kGradientPanels];
  int64_t from[kGradientPanels];  // keys of the block between the first and the last tile that a panel sees
  int64_t to[kGradientPanels];

  Panel<E>& panel(int i) const { return reinterpret_cast<Panel<E>*>(scratch + head.plan().local_at)[i]; }
  Scalar* probs(int i) const {
    return reinterpret_cast<Scalar*>(scratch + head.plan().probs_at) + i * E::kKeys * E::kLanes;
  }
  Scalar* grads(int i, int64_t block_key) const {
    return reinterpret_cast<Scalar*>(scratch + head.plan().grads_at) +
           (i * int64_t{E::kBlockKeys} + block_key) * E::kLanes;
  }
  int64_t span_row(int i) const { return (first_panel + i) % head.plan().span_panels * E::kLanes; }
  bool sees(int i, int lane, int64_t block_key) const {
    return lane_sees<E>(panel(i), dense[i].visible, block, lane, block_key);
  }
};

// Brings the panels' dense arguments for the block; false if no row sees any of its keys.
template <class E>
inline bool enter_gradient_block(GradientBlock<E>& g) {
  const BackwardPlan<E>& plan = g.head.plan();
  bool any = false;
  for (int i = 0; i < g.panels; ++i) {
    const Panel<E>& shared = g.head.panel(g.first_panel + i);
    g.from[i] = g.to[i] = 0;
    g.dense[i] = {};
    Panel<E>& panel = g.panel(i);
    if (shared.first_min >= g.block_end || shared.last_max <= g.block) {
      panel.first_min = INT64_MAX;  // no tile is seen
      panel.last_max = 0;
      panel.live = shared.live;
      continue;
    }
    memcpy(static_cast<void*>(&panel), &shared, sizeof panel);
    enter_block<E>(panel, g.block);
    g.dense[i] = dense_block<E>(panel, g.head.p(), g.block, g.block, g.block_end,
                                g.scratch + plan.dense_at + i * plan.dense_bytes);
    any = true;
  }
  return any;
}

// What comes in for the weights of one tile, transposed; 0 where there are none.
template <class E>
FASTATTN_NOINLINE void read_weight_grads(const BackwardParams& b, const Panel<E>& panel, int64_t batch, int64_t key,
                                         int64_t end, typename E::Scalar* out) {
  using Source = typename E::Source;
  for (int r = 0; r < E::kKeys; ++r) {
    for (int lane = 0; lane < E::kLanes; ++lane) {
      const bool there = lane < panel.live && key + r < end;
      const int64_t* strides = b.grad_weights_strides;
      out[r * E::kLanes + lane] =
          there ? static_cast<typename E::Scalar>(
                      to_scalar(*at<Source>(b.grad_weights, batch * strides[0] + panel.head[lane] * strides[1] +
                                                                panel.row[lane] * strides[2] + (key + r) * strides[3])))
                : 0;
    }
  }
}

// P and dS of the tile of panel `i` at `key`. Returns whether any row sees it.
template <class E>
inline bool gradient_tiles(GradientBlock<E>& g, int i, int64_t key) {
  using Scalar = typename E::Scalar;
  const BackwardHead<E>& head = g.head;
  const BackwardPlan<E>& plan = head.plan();
  const BackwardParams& b = head.call.b;
  Panel<E>& panel = g.panel(i);
  const int64_t block_key = key - g.block;
  Scalar* grads = g.grads(i, block_key);
  GradientContext<E> context{{panel, plan.rules, g.dense[i], nullptr, nullptr, nullptr, true, 0, {}},
                             head.scalars(plan.grad_out_at) + (g.first_panel + i) * E::kLanes * head.p().value_dim,
                             head.p().value_dim,
                             head.scalars(plan.level_at) + (g.first_panel + i) * E::kLanes,
                             head.scalars(plan.delta_at) + (g.first_panel + i) * E::kLanes,
                             nullptr,
                             nullptr,
                             nullptr,
                             block_key};
  const Sight sight = tile_sight<E>(context.scores, g.block, key);
  if (sight == Sight::none) {
    if (g.to[i] > 0) {
      memset(grads, 0, sizeof(Scalar) * E::kKeys * E::kLanes);
    }
    return false;
  }
  g.from[i] = g.to[i] == 0 ? block_key : g.from[i];
  g.to[i] = min64(block_key + E::kKeys, g.block_end - g.block);
  context.scores.edge = sight == Sight::edge;
  const bool drops = plan.rules.dropout.threshold > 0;
  if (drops) {
    auto* kept = reinterpret_cast<Scalar*>(g.scratch + plan.kept_at);
    draw_kept<E, E::kKeys>(panel, plan.rules.dropout, block_key, kept);
    context.kept = kept;
  }
  const bool hides = sight != Sight::all;
  const RowBase keys = head.key_rows(key);
  const RowBase values = head.value_rows(key);
  auto* raw = reinterpret_cast<Scalar*>(g.scratch + plan.raw_at);
  const bool wide = panel.live > E::kWidth;
  const auto score = [&](auto one, auto all) { return wide ? all : one; };
  auto* probability =
      plan.rules.natural
          ? (hides ? score(probability_tile<E, TileKind::adjusted_masked, 1>,
                           probability_tile<E, TileKind::adjusted_masked, E::kVectors>)
                   : score(probability_tile<E, TileKind::adjusted, 1>,
                           probability_tile<E, TileKind::adjusted, E::kVectors>))
          : (hides ? score(probability_tile<E, TileKind::masked, 1>, probability_tile<E, TileKind::masked, E::kVectors>)
                   : score(probability_tile<E, TileKind::plain, 1>, probability_tile<E, TileKind::plain, E::kVectors>));
  probability(context, {keys.rows, keys.stride}, g.probs(i), plan.rules.softcap > 0 ? raw : nullptr);
  auto* gradient = hides || drops ? score(gradient_tile<E, true, 1>, gradient_tile<E, true, E::kVectors>)
                                  : score(gradient_tile<E, false, 1>, gradient_tile<E, false, E::kVectors>);
  gradient(context, {values.rows, values.stride}, g.probs(i), grads);
  if (plan.general) {
    auto* extra = reinterpret_cast<Scalar*>(g.scratch + plan.extra_at);
    auto* slopes = reinterpret_cast<double*>(g.scratch + plan.lane_slopes_at);
    if (b.grad_weights != nullptr) {
      read_weight_grads<E>(b, panel, head.batch, key, g.block_end, extra);
      context.probs_grad = extra;
    }
    const bool slope = b.grad_slopes != nullptr && !g.of_scores;
    if (slope) {
      memset(slopes, 0, sizeof(double) * E::kLanes);
      context.slope_grad = slopes;
    }
    gradient_extras<E>(context, g.probs(i), g.of_scores ? nullptr : raw, grads);
    for (int lane = 0; slope && lane < panel.live; ++lane) {
      head.slopes(g.group)[panel.head[lane] - head.kv_head * (head.p().query_heads / head.p().kv_heads)] +=
          slopes[lane];
    }
  }
  return true;
}

// Rows of dO, or of queries, that were left out of a product because they are not finite: added to the keys that
// their row sees.
template <class E>
FASTATTN_NOINLINE void add_bad_rows(const GradientBlock<E>& g, int i, const bool* bad, const void* tensor,
                                    const int64_t* strides, int64_t columns, const typename E::Scalar* coefficients,
                                    int64_t block_key, typename E::Scalar* out, int64_t out_stride) {
  using Scalar = typename E::Scalar;
  const AttentionParams& p = g.head.p();
  const Panel<E>& panel = g.panel(i);
  for (int lane = 0; lane < panel.live; ++lane) {
    if (!bad[(g.head.batch * p.query_heads + panel.head[lane]) * p.seqlen_q + panel.row[lane]]) {
      continue;
    }
    const auto* row = at<typename E::Source>(
        tensor, g.head.batch * strides[0] + panel.head[lane] * strides[1] + panel.row[lane] * strides[2]);
    for (int r = 0; r < E::kKeys && g.block + block_key + r < g.block_end; ++r) {
      for (int64_t d = 0; g.sees(i, lane, block_key + r) && d < columns; ++d) {
        out[r * out_stride + d] +=
            coefficients[r * E::kLanes + lane] * static_cast<Scalar>(to_scalar(row[d * strides[3]]));
      }
    }
  }
}

// Adds what a run of panels gives to dK and dV of the tile at `block_key`.
template <class E>
inline void add_key_grads(const GradientBlock<E>& g, int first, int count, int64_t block_key,
                          typename E::Scalar* grad_key, typename E::Scalar* grad_value) {
  const BackwardPlan<E>& plan = g.head.plan();
  const BackwardParams& b = g.head.call.b;
  const BadRows& bad = g.head.call.bad;
  const int64_t row = g.span_row(first);
  const int last = g.panel(first + count - 1).live;
  if (b.grad_value != nullptr) {
    auto* out = grad_value + block_key * plan.value_dim;
    product_rows<E, E::kKeys, E::kLanes, 1>(g.probs(first), int64_t{E::kKeys} * E::kLanes, count, E::kLanes, last,
                                            g.head.grad_out_rows(g.span, row), out, plan.value_dim);
    for (int i = first; bad.grad_out != nullptr && i < first + count; ++i) {
      add_bad_rows<E>(g, i, bad.grad_out, b.grad_out, b.grad_out_strides, b.forward.value_dim, g.probs(i), block_key,
                      out, plan.value_dim);
    }
  }
  if (b.grad_key != nullptr) {
    auto* out = grad_key + block_key * plan.head_dim;
    product_rows<E, E::kKeys, E::kLanes, 1>(g.grads(first, block_key), int64_t{E::kBlockKeys} * E::kLanes, count,
                                            E::kLanes, last, g.head.query_rows(g.span, row), out, plan.head_dim);
    for (int i = first; bad.query != nullptr && i < first + count; ++i) {
      add_bad_rows<E>(g, i, bad.query, b.forward.query, b.forward.query_strides, b.forward.head_dim,
                      g.grads(i, block_key), block_key, out, plan.head_dim);
    }
  }
}

// Adds what the block's keys give to dQ of panel `i`.
template <class E>
inline void add_query_grads(const GradientBlock<E>& g, int i) {
  using Scalar = typename E::Scalar;
  const BackwardHead<E>& head = g.head;
  const BackwardPlan<E>& plan = head.plan();
  const AttentionParams& p = head.p();
  const int64_t keys = g.to[i] - g.from[i];
  Scalar* out = head.partial(g.group, g.first_panel + i);
  const Panel<E>& panel = g.panel(i);
  for (int lane = 0; keys > 0 && lane < panel.live; lane += E::kRows) {
    product_rows<E, E::kRows, 1, E::kLanes>(g.grads(i, g.from[i]) + lane, 0, 1, 0, keys,
                                            head.clean_key_rows(g.block + g.from[i]), out + lane * plan.head_dim,
                                            plan.head_dim);
  }
  const bool* bad = head.call.bad.key;
  for (int64_t key = g.from[i]; bad != nullptr && key < g.to[i]; ++key) {
    if (!bad[(head.batch * p.kv_heads + head.kv_head) * p.seqlen_k + g.block + key]) {
      continue;
    }
    const auto* row = key_row<E>(p, head.batch, head.kv_head, g.block + key);
    for (int lane = 0; lane < panel.live; ++lane) {
      for (int64_t d = 0; g.sees(i, lane, key) && d < p.head_dim; ++d) {
        out[lane * plan.head_dim + d] +=
            g.grads(i, key)[lane] * static_cast<Scalar>(to_scalar(row[d * p.key_strides[3]]));
      }
    }
  }
}

template <class E>
inline void run_gradient_block(GradientBlock<E>& g, typename E::Scalar* grad_key, typename E::Scalar* grad_value) {
  if (!enter_gradient_block<E>(g)) {
    return;
  }
  for (int64_t key = g.block; key < g.block_end; key += E::kKeys) {
    int run = 0;  // panels since the last one that does not see the tile
    for (int i = 0; i < g.panels; ++i) {
      if (gradient_tiles<E>(g, i, key)) {
        ++run;
        continue;
      }
      if (run > 0) {
        add_key_grads<E>(g, i - run, run, key - g.block, grad_key, grad_value);
      }
      run = 0;
    }
    if (run > 0) {
      add_key_grads<E>(g, g.panels - run, run, key - g.block, grad_key, grad_value);
    }
  }
  for (int i = 0; g.head.call.b.grad_query != nullptr && i < g.panels; ++i) {
    add_query_grads<E>(g, i);
  }
}

}  // namespace
}  // namespace fastattn
