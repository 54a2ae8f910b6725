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
  DenseBlock<E> dense[kGradientPanels]{};
  int64_t from[kGradientPanels]{};  // keys of the block between the first and the last tile that a panel sees
  int64_t to[kGradientPanels]{};
  uint32_t seen[E::kBlockKeys / E::kKeys]{};  // a bit for each panel that sees a tile

  Panel<E>& panel(int i) const { return reinterpret_cast<Panel<E>*>(scratch + head.plan().local_at)[i]; }
  // Coefficients of the tile at `block_key`; those of a panel lie side by side.
  Scalar* tile_scratch(int64_t offset, int i, int64_t block_key) const {
    return reinterpret_cast<Scalar*>(scratch + offset) + (i * int64_t{E::kBlockKeys} + block_key) * kKeyLanes<E>;
  }
  Coefficients<E> coefficients(int i, int64_t block_key) const {
    const BackwardPlan<E>& plan = head.plan();
    return {tile_scratch(plan.probs_at, i, block_key), tile_scratch(plan.grads_at, i, block_key),
            tile_scratch(plan.query_grads_at, i, block_key)};
  }
  // P and dS of the tile as numbers: where depth is 1 these are the coefficients.
  Scalar* probs(const Coefficients<E>& to) const {
    return E::kDepth == 1 ? to.probs : reinterpret_cast<Scalar*>(scratch + head.plan().tile_probs_at);
  }
  Scalar* grads(const Coefficients<E>& to) const {
    return E::kDepth == 1 ? to.grads : reinterpret_cast<Scalar*>(scratch + head.plan().tile_grads_at);
  }
  int64_t span_row(int i) const { return (first_panel + i) % head.plan().span_panels * E::kLanes; }
  bool sees(int i, int lane, int64_t block_key) const {
    return lane_sees<E>(panel(i), dense[i].visible, block, lane, block_key);
  }
};

// The key block that starts at `block`, seen by `panels` panels of one span.
template <class E>
inline GradientBlock<E> gradient_block(const BackwardHead<E>& head, char* scratch, int64_t group, int64_t first_panel,
                                       int64_t panels, int64_t block, bool of_scores = false) {
  return {head,        scratch,
          group,       first_panel / head.plan().span_panels,
          first_panel, static_cast<int>(panels),
          block,       min64(block + E::kBlockKeys, head.p().seqlen_k),
          of_scores};
}

// Brings the panels' dense arguments for the block; false if no row sees any of its keys.
template <class E>
inline bool enter_gradient_block(GradientBlock<E>& g) {
  const BackwardPlan<E>& plan = g.head.plan();
  bool any = false;
  memset(g.seen, 0, sizeof g.seen);
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

// What the tiles of one panel have in common.
template <class E>
inline GradientContext<E> gradient_context(const GradientBlock<E>& g, int i) {
  const BackwardHead<E>& head = g.head;
  const BackwardPlan<E>& plan = head.plan();
  const int64_t panel = g.first_panel + i;
  return {{g.panel(i), plan.rules, g.dense[i], nullptr, nullptr, nullptr, true, 0, {}},
          head.scalars(plan.grad_out_at) + panel * E::kLanes * plan.value_steps,
          plan.value_steps,
          head.scalars(plan.level_at) + panel * E::kLanes,
          head.scalars(plan.excess_at) + panel * E::kLanes,
          head.scalars(plan.delta_at) + panel * E::kLanes,
          nullptr,
          nullptr,
          nullptr,
          0};
}

// What the fast tile leaves out.
template <class E>
FASTATTN_NOINLINE void extend_gradients(const GradientBlock<E>& g, GradientContext<E>& context,
                                        typename E::Scalar* probs, typename E::Scalar* grads) {
  using Scalar = typename E::Scalar;
  const BackwardHead<E>& head = g.head;
  const BackwardPlan<E>& plan = head.plan();
  const BackwardParams& b = head.call.b;
  const Panel<E>& panel = context.scores.panel;
  auto* raw = reinterpret_cast<Scalar*>(g.scratch + plan.raw_at);
  auto* extra = reinterpret_cast<Scalar*>(g.scratch + plan.extra_at);
  auto* slopes = reinterpret_cast<double*>(g.scratch + plan.lane_slopes_at);
  if (b.grad_weights != nullptr) {
    read_weight_grads<E>(b, panel, head.batch, g.block + context.block_key, g.block_end, extra);
    context.probs_grad = extra;
  }
  const bool slope = b.grad_slopes != nullptr && !g.of_scores;
  if (slope) {
    memset(slopes, 0, sizeof(double) * E::kLanes);
    context.slope_grad = slopes;
  }
  gradient_extras<E>(context, probs, g.of_scores ? nullptr : raw, grads);
  for (int lane = 0; slope && lane < panel.live; ++lane) {
    head.slopes(g.group)[panel.head[lane] - head.kv_head * (head.p().query_heads / head.p().kv_heads)] += slopes[lane];
  }
}

// P of the tile at `context.block_key`, of rows that see it as `sight` says.
template <class E, int kActive>
inline void compute_probabilities(const GradientBlock<E>& g, GradientContext<E>& context, Sight sight,
                                  typename E::Scalar* probs) {
  const BackwardPlan<E>& plan = g.head.plan();
  context.scores.edge = sight == Sight::edge;
  const bool hides = sight != Sight::all;
  const RowBase keys = g.head.key_rows(g.block + context.block_key);
  auto* raw = plan.rules.softcap > 0 ? reinterpret_cast<typename E::Scalar*>(g.scratch + plan.raw_at) : nullptr;
  auto* probability =
      plan.rules.natural
          ? (hides ? probability_tile<E, TileKind::adjusted_masked, kActive>
                   : probability_tile<E, TileKind::adjusted, kActive>)
          : (hides ? probability_tile<E, TileKind::masked, kActive> : probability_tile<E, TileKind::plain, kActive>);
  probability(context, {keys.rows, keys.stride}, probs, raw);
}

// The same with dS.
template <class E, int kActive>
inline void compute_tile(const GradientBlock<E>& g, GradientContext<E>& context, Sight sight,
                         const Coefficients<E>& to) {
  using Scalar = typename E::Scalar;
  const BackwardHead<E>& head = g.head;
  const BackwardPlan<E>& plan = head.plan();
  const bool drops = plan.rules.dropout.threshold > 0;
  if (drops) {
    auto* kept = reinterpret_cast<Scalar*>(g.scratch + plan.kept_at);
    draw_kept<E, E::kKeys>(context.scores.panel, plan.rules.dropout, context.block_key, kept);
    context.kept = kept;
  }
  const bool hides = sight != Sight::all;
  const RowBase values = head.value_rows(g.block + context.block_key);
  Scalar* probs = g.probs(to);
  Scalar* grads = g.grads(to);
  compute_probabilities<E, kActive>(g, context, sight, probs);
  const bool extends = plan.general || (E::kDepth > 1 && g.of_scores);  // the bias takes dS as numbers
  (hides || drops ? gradient_tile<E, true, kActive>
                  : gradient_tile<E, false, kActive>)(context, {values.rows, values.stride}, probs, grads,
                                                      extends ? nullptr : &to);
  if (plan.general) {
    extend_gradients<E>(g, context, probs, grads);
  }
  if (E::kDepth > 1 && extends && !g.of_scores) {
    pack_coefficients<E, kActive>(probs, grads, to);
  }
}

// The tile of panel `i` at `block_key`. Returns whether any row sees it.
template <class E>
inline bool gradient_tiles(GradientBlock<E>& g, GradientContext<E>& context, int i, int64_t block_key) {
  const Sight sight = tile_sight<E>(context.scores, g.block, g.block + block_key);
  const Coefficients<E> to = g.coefficients(i, block_key);
  if (sight == Sight::none) {
    if (g.to[i] > 0) {
      memset(to.query_grads, 0, sizeof *to.query_grads * kTileCoefficients<E>);
    }
    return false;
  }
  g.from[i] = g.to[i] == 0 ? block_key : g.from[i];
  g.to[i] = min64(block_key + E::kKeys, round_up(g.block_end - g.block, E::kDepth));
  g.seen[block_key / E::kKeys] |= 1U << i;
  context.block_key = block_key;
  if (context.scores.panel.live > E::kWidth) {
    compute_tile<E, E::kVectors>(g, context, sight, to);
  } else {
    compute_tile<E, 1>(g, context, sight, to);
  }
  return true;
}

// A coefficient of a tile, one query and one of its keys.
template <class E>
inline typename E::Scalar coefficient(const typename E::Scalar* tile, int key, int lane) {
  return to_scalar(reinterpret_cast<const typename E::Element*>(tile)[key * E::kLanes + lane]);
}

// Rows of dO, or of queries, that were left out of a product because they are not finite: added to the keys of a tile
// that their row sees.
template <class E>
FASTATTN_NOINLINE void add_bad_rows(const GradientBlock<E>& g, int i, const bool* bad, const void* tensor,
                                    const int64_t* strides, int64_t columns, const typename E::Scalar* tile,
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
        out[r * out_stride + d] += coefficient<E>(tile, r, lane) * static_cast<Scalar>(to_scalar(row[d * strides[3]]));
      }
    }
  }
}

// The lanes of a panel that see some of the keys [begin, end), from the first to the last.
struct LaneRange {
  int64_t from;
  int64_t to;
};

template <class E>
inline LaneRange seeing_lanes(const Panel<E>& panel, int64_t begin, int64_t end) {
  LaneRange lanes{0, panel.live};
  const auto sees = [&](int64_t lane) { return panel.first[lane] < end && panel.last[lane] > begin; };
  while (lanes.from < lanes.to && !sees(lanes.from)) {
    ++lanes.from;
  }
  while (lanes.from < lanes.to && !sees(lanes.to - 1)) {
    --lanes.to;
  }
  return lanes;
}

// out[key][columns] += coefficients of the block's tiles times `rows` of queries or dO, which start at the first panel.
template <class E>
inline void add_rows(const GradientBlock<E>& g, int64_t coefficients_at, RowBase rows, int64_t columns,
                     typename E::Scalar* out) {
  constexpr int64_t kSteps = kKeyLanes<E>;  // of a panel
  for_columns<E, E::kKeys, kSteps, 1>(
      rows, columns, [&](ProductTileFn<E> tile, RowBase base, int64_t d) FASTATTN_LAMBDA_INLINE {
        for (int64_t key = 0; key < g.block_end - g.block; key += E::kKeys) {
          uint32_t seen = g.seen[key / E::kKeys];
          while (seen != 0) {  // a run of panels that see the tile
            const int first = __builtin_ctz(seen);
            const int count = __builtin_ctz(~(seen >> first));
            seen &= ~(((1U << count) - 1U) << first);
            const int64_t begin = g.block + key;
            const LaneRange head = seeing_lanes<E>(g.panel(first), begin, begin + E::kKeys);
            const LaneRange tail = seeing_lanes<E>(g.panel(first + count - 1), begin, begin + E::kKeys);
            tile(g.tile_scratch(coefficients_at, first, key),
                 {count, int64_t{E::kBlockKeys} * kSteps, kSteps, head.from / E::kDepth,
                  round_up(tail.to, E::kDepth) / E::kDepth},
                 {base.rows + first * kSteps * base.stride, base.stride}, out + key * columns + d, columns);
          }
        }
      });
}

// Adds what the block's queries give to dV and dK of its keys.
template <class E>
inline void add_key_grads(const GradientBlock<E>& g, typename E::Scalar* grad_key, typename E::Scalar* grad_value) {
  const BackwardPlan<E>& plan = g.head.plan();
  const BackwardParams& b = g.head.call.b;
  const BadRows& bad = g.head.call.bad;
  if (b.grad_value != nullptr) {
    add_rows<E>(g, plan.probs_at, g.head.grad_out_steps(g.span, g.span_row(0)), plan.value_dim, grad_value);
  }
  if (b.grad_key != nullptr) {
    add_rows<E>(g, plan.grads_at, g.head.query_steps(g.span, g.span_row(0)), plan.head_dim, grad_key);
  }
  if (bad.query == nullptr) {
    return;
  }
  for (int64_t key = 0; key < g.block_end - g.block; key += E::kKeys) {
    for (int i = 0; i < g.panels; ++i) {
      if ((g.seen[key / E::kKeys] >> i & 1U) == 0) {
        continue;
      }
      const Coefficients<E> tile = g.coefficients(i, key);
      if (b.grad_value != nullptr) {
        add_bad_rows<E>(g, i, bad.grad_out, b.grad_out, b.grad_out_strides, b.forward.value_dim, tile.probs, key,
                        grad_value + key * plan.value_dim, plan.value_dim);
      }
      if (b.grad_key != nullptr) {
        add_bad_rows<E>(g, i, bad.query, b.forward.query, b.forward.query_strides, b.forward.head_dim, tile.grads, key,
                        grad_key + key * plan.head_dim, plan.head_dim);
      }
    }
  }
}

// Keys that were left out of dQ of panel `i` because they are not finite: added to the rows that see them.
template <class E>
FASTATTN_NOINLINE void add_bad_keys(const GradientBlock<E>& g, int i, typename E::Scalar* out) {
  using Scalar = typename E::Scalar;
  const BackwardHead<E>& head = g.head;
  const AttentionParams& p = head.p();
  const bool* bad = head.call.bad.key + (head.batch * p.kv_heads + head.kv_head) * p.seqlen_k + g.block;
  for (int64_t key = g.from[i]; key < min64(g.to[i], g.block_end - g.block); ++key) {
    const int64_t tile = round_down(key, E::kKeys);
    if (!bad[key] || (g.seen[tile / E::kKeys] >> i & 1U) == 0) {
      continue;
    }
    const auto* row = key_row<E>(p, head.batch, head.kv_head, g.block + key);
    const Scalar* grads = g.coefficients(i, tile).grads;
    for (int lane = 0; lane < g.panel(i).live; ++lane) {
      const Scalar grad = coefficient<E>(grads, static_cast<int>(key - tile), lane);
      for (int64_t d = 0; g.sees(i, lane, key) && d < p.head_dim; ++d) {
        out[lane * head.plan().head_dim + d] += grad * static_cast<Scalar>(to_scalar(row[d * p.key_strides[3]]));
      }
    }
  }
}

// The keys that some of kRows lanes see, from the first to past the last, counted from `block`.
template <class E>
inline Interval seen_keys(const Panel<E>& panel, int lane, int64_t block) {
  Interval seen{panel.first[lane], panel.last[lane]};
  for (int i = lane + 1; i < min64(lane + E::kRows, panel.live); ++i) {
    seen = {min64(seen.first, panel.first[i]), max64(seen.last, panel.last[i])};
  }
  return {max64(seen.first - block, 0), seen.last - block};
}

// Adds what the block's keys give to dQ of its queries.
template <class E>
inline void add_query_grads(const GradientBlock<E>& g) {
  const BackwardHead<E>& head = g.head;
  const BackwardPlan<E>& plan = head.plan();
  for_columns<E, E::kRows, 1, E::kLanes>(
      head.key_steps(g.block), plan.head_dim,
      [&](ProductTileFn<E> tile, RowBase base, int64_t d) FASTATTN_LAMBDA_INLINE {
        for (int i = 0; i < g.panels; ++i) {
          const Panel<E>& panel = g.panel(i);
          const auto* grads = g.tile_scratch(plan.query_grads_at, i, 0);
          auto* out = head.partial(g.group, g.first_panel + i) + d;
          for (int lane = 0; g.from[i] < g.to[i] && lane < panel.live; lane += E::kRows) {
            const Interval keys = seen_keys<E>(panel, lane, g.block);
            const int64_t from = max64(g.from[i], keys.first) / E::kDepth;
            const int64_t to = round_up(min64(g.to[i], keys.last), E::kDepth) / E::kDepth;
            if (from < to) {
              tile(grads + lane, {1, 0, 0, from, to}, base, out + lane * plan.head_dim, plan.head_dim);
            }
          }
        }
      });
  for (int i = 0; head.call.bad.key != nullptr && i < g.panels; ++i) {
    add_bad_keys<E>(g, i, head.partial(g.group, g.first_panel + i));
  }
}

template <class E>
inline void run_gradient_block(GradientBlock<E>& g, typename E::Scalar* grad_key, typename E::Scalar* grad_value) {
  if (!enter_gradient_block<E>(g)) {
    return;
  }
  for (int i = 0; i < g.panels; ++i) {
    GradientContext<E> context = gradient_context<E>(g, i);
    for (int64_t key = 0; key < g.block_end - g.block; key += E::kKeys) {
      gradient_tiles<E>(g, context, i, key);
    }
  }
  add_key_grads<E>(g, grad_key, grad_value);
  if (g.head.call.b.grad_query != nullptr) {
    add_query_grads<E>(g);
  }
}

}  // namespace
}  // namespace fastattn
