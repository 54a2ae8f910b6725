// Attention backward, once for every element type and ISA.
//
// The probabilities are computed again from the scores and the log-sum-exp. A task takes every so-many-th key block of
// one key/value head, and over all rows that see it adds up dK and dV, which are then complete, and the part of dQ that
// these keys give. How key blocks are dealt to tasks depends on the number of keys alone, and parts are added in a
// fixed order, so the bits of a result do not depend on threads or neighbours.
#pragma once

#include "algorithm/backward_plan.h"
#include "algorithm/block.h"
#include "algorithm/finish.h"
#include "params.h"

namespace fastattn {
namespace {

// Rows that are not finite, where some pair is hidden: a coefficient of 0 does not silence them. Null: none.
struct BadRows {
  const bool* query;     // [batch][Hq][Lq]
  const bool* grad_out;  // the same
  const bool* key;       // [batch][Hkv][Lk]
};

// What the tasks of one wave share.
template <class E>
struct BackwardCall {
  const BackwardParams& b;
  const BackwardPlan<E>& plan;
  BadRows bad;
  char* threads;       // [threads][thread_bytes]
  char* heads;         // [wave][head_bytes]
  int64_t first_head;  // of the wave, counted over batch and key/value heads
};

// One key/value head of the wave.
template <class E>
struct BackwardHead {
  using Scalar = typename E::Scalar;
  using Source = typename E::Source;
  const BackwardCall<E>& call;
  int64_t batch;
  int64_t kv_head;
  char* scratch;

  const BackwardPlan<E>& plan() const { return call.plan; }
  const AttentionParams& p() const { return call.b.forward; }
  Panel<E>& panel(int64_t i) const { return reinterpret_cast<Panel<E>*>(scratch + plan().panels_at)[i]; }
  Scalar* scalars(int64_t offset) const { return reinterpret_cast<Scalar*>(scratch + offset); }
  Scalar* partial(int64_t group, int64_t i) const {
    return scalars(plan().partial_at) + (group * plan().head_panels + i) * E::kLanes * plan().head_dim;
  }
  double* slopes(int64_t group) const {
    return reinterpret_cast<double*>(scratch + plan().slopes_at) + group * (p().query_heads / p().kv_heads);
  }

  // Rows of a span from `row` on, where they lie or packed.
  RowBase rows(bool packed, int64_t packed_at, int64_t columns, const void* tensor, const int64_t* strides,
               int64_t span, int64_t row) const {
    constexpr auto kScalar = static_cast<int64_t>(sizeof(Scalar));
    if (packed) {
      return {scratch + packed_at + (span * plan().span_rows + row) * columns * kScalar, columns * kScalar};
    }
    const int64_t head = kv_head * (p().query_heads / p().kv_heads) + span;
    const auto* first = at<Source>(tensor, batch * strides[0] + head * strides[1] + row * strides[2]);
    return {reinterpret_cast<const char*>(first), strides[2] * kScalar};
  }
  RowBase query_rows(int64_t span, int64_t row) const {
    return rows(plan().pack_query, plan().query_rows_at, plan().head_dim, p().query, p().query_strides, span, row);
  }
  RowBase grad_out_rows(int64_t span, int64_t row) const {
    return rows(plan().pack_grad_out, plan().grad_out_rows_at, plan().value_dim, call.b.grad_out,
                call.b.grad_out_strides, span, row);
  }

  // Keys and values from `key` on.
  RowBase keys(bool packed, int64_t packed_at, int64_t columns, const void* first, int64_t stride, int64_t key) const {
    constexpr auto kScalar = static_cast<int64_t>(sizeof(Scalar));
    if (packed) {
      return {scratch + packed_at + key * columns * kScalar, columns * kScalar};
    }
    return {static_cast<const char*>(first) + key * stride * kScalar, stride * kScalar};
  }
  RowBase key_rows(int64_t key) const {
    return keys(plan().pack_key, plan().key_rows_at, plan().head_dim, key_row<E>(p(), batch, kv_head, 0),
                p().key_strides[2], key);
  }
  RowBase clean_key_rows(int64_t key) const {
    return plan().clean_key ? keys(true, plan().clean_key_at, plan().head_dim, nullptr, 0, key) : key_rows(key);
  }
  RowBase value_rows(int64_t key) const {
    return keys(plan().pack_value, plan().value_rows_at, plan().value_dim, value_row<E>(p(), batch, kv_head, 0),
                p().value_strides[2], key);
  }
};

template <class E>
inline BackwardHead<E> backward_head(const BackwardCall<E>& call, int64_t index) {
  const int64_t head = call.first_head + index;
  const AttentionParams& p = call.b.forward;
  return {call, head / p.kv_heads, head % p.kv_heads, call.heads + index * call.plan.head_bytes};
}

// A row as whole vectors of the scalar, padded with zeros; all zeros for a null row.
template <class E>
inline void pack_row(const typename E::Source* row, int64_t stride, int64_t count, typename E::Scalar* out,
                     int64_t padded) {
  for (int64_t d = 0; d < padded; ++d) {
    out[d] = row != nullptr && d < count ? static_cast<typename E::Scalar>(to_scalar(row[d * stride])) : 0;
  }
}

// The reference point of each lane: its normaliser, and the mean that its gradients are taken from.
template <class E>
inline void place_levels(const BackwardHead<E>& head, const Panel<E>& panel, typename E::Scalar* level,
                         typename E::Scalar* delta) {
  using Scalar = typename E::Scalar;
  using Source = typename E::Source;
  const BackwardParams& b = head.call.b;
  const AttentionParams& p = b.forward;
  const auto read = [&](const void* tensor, const int64_t* strides, int lane) {
    const int64_t index = head.batch * strides[0] + panel.head[lane] * strides[1] + panel.row[lane] * strides[2];
    return p.dtype == DType::float64 ? *at<double>(tensor, index) : static_cast<double>(*at<float>(tensor, index));
  };
  for (int lane = 0; lane < E::kLanes; ++lane) {
    level[lane] = static_cast<Scalar>(__builtin_inf());  // P = 0 where there is no row, or nothing to attend to
    delta[lane] = 0;
    if (lane >= panel.live) {
      continue;
    }
    const double lse = read(p.lse, p.lse_strides, lane);
    if (lse == -__builtin_inf()) {
      continue;
    }
    const int64_t row = head.batch * b.grad_out_strides[0] + panel.head[lane] * b.grad_out_strides[1] +
                        panel.row[lane] * b.grad_out_strides[2];
    const auto* out = at<Source>(p.out, head.batch * p.out_strides[0] + panel.head[lane] * p.out_strides[1] +
                                            panel.row[lane] * p.out_strides[2]);
    const auto* grad = at<Source>(b.grad_out, row);
    double sum = 0;
    for (int64_t d = 0; d < p.value_dim; ++d) {
      sum += static_cast<double>(to_scalar(grad[d * b.grad_out_strides[3]])) *
             static_cast<double>(to_scalar(out[d * p.out_strides[3]]));
    }
    sum -= b.grad_lse != nullptr ? read(b.grad_lse, b.grad_lse_strides, lane) : 0;
    level[lane] = static_cast<Scalar>(lse * (head.plan().rules.natural ? 1.0 : kLog2E) - panel.beyond[lane]);
    delta[lane] = static_cast<Scalar>(sum);
  }
}

// Everything that a panel's rows bring: operands, rows, levels.
template <class E>
void prepare_rows(void* opaque, int64_t index, int /*thread*/) {
  const auto& call = *static_cast<const BackwardCall<E>*>(opaque);
  const BackwardPlan<E>& plan = call.plan;
  const BackwardHead<E> head = backward_head(call, index / plan.head_panels);
  const AttentionParams& p = head.p();
  const int64_t i = index % plan.head_panels;
  const int64_t span = i / plan.span_panels;
  const int64_t row = i % plan.span_panels * E::kLanes;
  const RowRange range{head.batch, head.kv_head, span * plan.span_rows, (span + 1) * plan.span_rows};
  Panel<E>& panel = head.panel(i);
  place_rows<E>(panel, p, range, range.begin + row);
  AttentionParams grads = p;
  grads.query = call.b.grad_out;
  grads.head_dim = p.value_dim;
  for (int axis = 0; axis < 4; ++axis) {
    grads.query_strides[axis] = call.b.grad_out_strides[axis];
  }
  panel.query = head.scalars(plan.grad_out_at) + i * E::kLanes * p.value_dim;
  pack_query<E>(panel, grads, head.batch, 1.0);
  panel.query = head.scalars(plan.query_at) + i * E::kLanes * p.head_dim;
  pack_query<E>(panel, p, head.batch, plan.query_factor);
  place_levels<E>(head, panel, head.scalars(plan.level_at) + i * E::kLanes,
                  head.scalars(plan.delta_at) + i * E::kLanes);
  const auto pack = [&](bool packs, int64_t rows_at, const AttentionParams& from, const bool* bad, int64_t columns) {
    auto* out = head.scalars(rows_at) + (range.begin + row) * columns;
    for (int lane = 0; packs && lane < panel.live; ++lane, out += columns) {
      const int64_t flat = (head.batch * p.query_heads + panel.head[lane]) * p.seqlen_q + panel.row[lane];
      pack_row<E>(bad != nullptr && bad[flat] ? nullptr : query_row<E>(panel, from, head.batch, lane),
                  from.query_strides[3], from.head_dim, out, columns);
    }
  };
  pack(plan.pack_query, plan.query_rows_at, p, call.bad.query, plan.head_dim);
  pack(plan.pack_grad_out, plan.grad_out_rows_at, grads, call.bad.grad_out, plan.value_dim);
}

// Packs one block of keys and values of one head.
template <class E>
void prepare_keys(void* opaque, int64_t index, int /*thread*/) {
  const auto& call = *static_cast<const BackwardCall<E>*>(opaque);
  const BackwardPlan<E>& plan = call.plan;
  const BackwardHead<E> head = backward_head(call, index / plan.blocks);
  const AttentionParams& p = head.p();
  const int64_t begin = index % plan.blocks * E::kBlockKeys;
  const bool* bad =
      call.bad.key == nullptr ? nullptr : call.bad.key + (head.batch * p.kv_heads + head.kv_head) * p.seqlen_k;
  for (int64_t key = begin; key < begin + E::kBlockKeys; ++key) {
    const bool there = key < p.seqlen_k;
    const auto* row = there ? key_row<E>(p, head.batch, head.kv_head, key) : nullptr;
    if (plan.pack_key) {
      pack_row<E>(row, p.key_strides[3], p.head_dim, head.scalars(plan.key_rows_at) + key * plan.head_dim,
                  plan.head_dim);
    }
    if (plan.clean_key) {
      pack_row<E>(there && bad[key] ? nullptr : row, p.key_strides[3], p.head_dim,
                  head.scalars(plan.clean_key_at) + key * plan.head_dim, plan.head_dim);
    }
    if (plan.pack_value) {
      pack_row<E>(there ? value_row<E>(p, head.batch, head.kv_head, key) : nullptr, p.value_strides[3], p.value_dim,
                  head.scalars(plan.value_rows_at) + key * plan.value_dim, plan.value_dim);
    }
  }
}

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
  GradientContext<E> context{{panel, plan.rules, g.dense[i], nullptr, nullptr, true, 0, {}},
                             head.scalars(plan.grad_out_at) + (g.first_panel + i) * E::kLanes * head.p().value_dim,
                             head.p().value_dim,
                             head.scalars(plan.level_at) + (g.first_panel + i) * E::kLanes,
                             head.scalars(plan.delta_at) + (g.first_panel + i) * E::kLanes,
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
  auto* gradient = hides ? score(gradient_tile<E, true, 1>, gradient_tile<E, true, E::kVectors>)
                         : score(gradient_tile<E, false, 1>, gradient_tile<E, false, E::kVectors>);
  gradient(context, {values.rows, values.stride}, g.probs(i), grads);
  if (plan.general) {
    auto* extra = reinterpret_cast<Scalar*>(g.scratch + plan.extra_at);
    auto* slopes = reinterpret_cast<double*>(g.scratch + plan.lane_slopes_at);
    if (b.grad_weights != nullptr) {
      read_weight_grads<E>(b, panel, head.batch, key, g.block_end, extra);
      context.probs_grad = extra;
    }
    if (b.grad_slopes != nullptr) {
      memset(slopes, 0, sizeof(double) * E::kLanes);
      context.slope_grad = slopes;
    }
    gradient_extras<E>(context, g.probs(i), raw, grads);
    for (int lane = 0; b.grad_slopes != nullptr && lane < panel.live; ++lane) {
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

// Rows of a gradient, scaled and rounded to their type.
template <class E>
inline void store_grads(const typename E::Scalar* rows, int64_t row_stride, int64_t count, int64_t columns,
                        double scale, void* tensor, const int64_t* strides, int64_t offset) {
  for (int64_t i = 0; i < count; ++i) {
    store_row<E>(rows + i * row_stride, scale, columns,
                 static_cast<typename E::Source*>(tensor) + offset + i * strides[2], strides[3]);
  }
}

// Key blocks of a group, dealt there and back so that all groups get as many rows to see under the causal rule.
inline int64_t dealt_block(int64_t round, int64_t group, int64_t groups) {
  return round * groups + (round % 2 == 0 ? group : groups - 1 - group);
}

// One group of key blocks of one head.
template <class E>
void run_key_group(void* opaque, int64_t index, int thread) {
  using Scalar = typename E::Scalar;
  const auto& call = *static_cast<const BackwardCall<E>*>(opaque);
  const BackwardPlan<E>& plan = call.plan;
  const BackwardParams& b = call.b;
  const BackwardHead<E> head = backward_head(call, index / plan.key_groups);
  const AttentionParams& p = head.p();
  const int64_t group = index % plan.key_groups;
  char* scratch = call.threads + thread * plan.thread_bytes;
  const typename E::V::FlushDenormals flush;
  auto* grad_key = reinterpret_cast<Scalar*>(scratch + plan.grad_key_at);
  auto* grad_value = reinterpret_cast<Scalar*>(scratch + plan.grad_value_at);
  if (b.grad_query != nullptr) {
    memset(head.partial(group, 0), 0,
           sizeof(Scalar) * static_cast<size_t>(plan.head_panels * E::kLanes * plan.head_dim));
  }
  for (int64_t h = 0; h < p.query_heads / p.kv_heads; ++h) {
    head.slopes(group)[h] = 0;
  }
  for (int64_t round = 0; round * plan.key_groups < plan.blocks; ++round) {
    const int64_t dealt = dealt_block(round, group, plan.key_groups);
    if (dealt >= plan.blocks) {
      continue;
    }
    const int64_t block = dealt * E::kBlockKeys;
    const int64_t block_end = min64(block + E::kBlockKeys, p.seqlen_k);
    memset(grad_key, 0, sizeof(Scalar) * static_cast<size_t>(E::kBlockKeys * plan.head_dim));
    memset(grad_value, 0, sizeof(Scalar) * static_cast<size_t>(E::kBlockKeys * plan.value_dim));
    for (int64_t span = 0; span < plan.spans; ++span) {
      for (int64_t first = 0; first < plan.span_panels; first += plan.panels) {
        GradientBlock<E> g{head,
                           scratch,
                           group,
                           span,
                           span * plan.span_panels + first,
                           static_cast<int>(min64(plan.panels, plan.span_panels - first)),
                           block,
                           block_end,
                           {},
                           {},
                           {}};
        run_gradient_block<E>(g, grad_key, grad_value);
      }
    }
    const auto store = [&](const Scalar* rows, int64_t columns, int64_t padded, double scale, void* tensor,
                           const int64_t* strides) {
      if (tensor != nullptr) {
        store_grads<E>(rows, padded, block_end - block, columns, scale, tensor, strides,
                       head.batch * strides[0] + head.kv_head * strides[1] + block * strides[2]);
      }
    };
    store(grad_key, p.head_dim, plan.head_dim, p.scale, b.grad_key, b.grad_key_strides);
    store(grad_value, p.value_dim, plan.value_dim, 1, b.grad_value, b.grad_value_strides);
  }
}

// dQ of one panel from the parts that the key groups gave.
template <class E>
void finish_query(void* opaque, int64_t index, int /*thread*/) {
  using V = typename E::V;
  const auto& call = *static_cast<const BackwardCall<E>*>(opaque);
  const BackwardPlan<E>& plan = call.plan;
  const BackwardHead<E> head = backward_head(call, index / plan.head_panels);
  const int64_t i = index % plan.head_panels;
  const Panel<E>& panel = head.panel(i);
  auto* sum = head.partial(0, i);
  for (int64_t group = 1; group < plan.key_groups; ++group) {
    const auto* part = head.partial(group, i);
    for (int64_t d = 0; d < panel.live * plan.head_dim; d += E::kWidth) {
      V::store(sum + d, V::add(V::load(sum + d), V::load(part + d)));
    }
  }
  const BackwardParams& b = call.b;
  for (int lane = 0; lane < panel.live; ++lane) {
    store_grads<E>(sum + lane * plan.head_dim, 0, 1, b.forward.head_dim, b.forward.scale, b.grad_query,
                   b.grad_query_strides,
                   head.batch * b.grad_query_strides[0] + panel.head[lane] * b.grad_query_strides[1] +
                       panel.row[lane] * b.grad_query_strides[2]);
  }
}

// Gradients of the numbers that a query head has one of: its slope and its sink.
template <class E>
void finish_head(void* opaque, int64_t index, int /*thread*/) {
  const auto& call = *static_cast<const BackwardCall<E>*>(opaque);
  const BackwardPlan<E>& plan = call.plan;
  const BackwardHead<E> head = backward_head(call, index);
  const BackwardParams& b = call.b;
  const AttentionParams& p = b.forward;
  const int64_t heads = p.query_heads / p.kv_heads;
  const int64_t first = head.batch * p.query_heads + head.kv_head * heads;
  for (int64_t h = 0; b.grad_slopes != nullptr && h < heads; ++h) {
    b.grad_slopes[first + h] = 0;
    for (int64_t group = 0; group < plan.key_groups; ++group) {
      b.grad_slopes[first + h] += head.slopes(group)[h];
    }
  }
  if (b.grad_sinks == nullptr) {
    return;
  }
  for (int64_t h = 0; h < heads; ++h) {
    b.grad_sinks[first + h] = 0;
  }
  for (int64_t i = 0; i < plan.head_panels; ++i) {
    const Panel<E>& panel = head.panel(i);
    const auto* level = head.scalars(plan.level_at) + i * E::kLanes;
    const auto* delta = head.scalars(plan.delta_at) + i * E::kLanes;
    for (int lane = 0; lane < panel.live; ++lane) {
      const double lse = (static_cast<double>(level[lane]) + panel.beyond[lane]) * plan.rules.to_natural();
      const int64_t query_head = panel.head[lane];
      const double sink = p.sinks[query_head];
      if (sink != -__builtin_inf()) {  // its share of the normaliser, which no value answers for
        b.grad_sinks[head.batch * p.query_heads + query_head] -= ::exp(sink - lse) * static_cast<double>(delta[lane]);
      }
    }
  }
}

// Marks the rows of a tensor (B, H, L, D) that are not finite; returns whether there are any.
template <class E>
struct RowSearch {
  AttentionParams tensor;  // as values
  int64_t heads;
  bool* bad;    // [batch][heads][rows]
  bool* found;  // [batch][heads]
};

template <class E>
void search_head(void* opaque, int64_t index, int /*thread*/) {
  const auto& search = *static_cast<const RowSearch<E>*>(opaque);
  const int64_t rows = search.tensor.seqlen_k;
  search.found[index] =
      find_nonfinite<E>(search.tensor, index / search.heads, index % search.heads, 0, rows, search.bad + index * rows);
}

template <class E>
inline bool search_rows(const AttentionParams& p, const void* tensor, const int64_t* strides, int64_t heads,
                        int64_t rows, int64_t columns, bool* bad, bool* found) {
  RowSearch<E> search{p, heads, bad, found};
  search.tensor.value = tensor;
  search.tensor.seqlen_k = rows;
  search.tensor.value_dim = columns;
  for (int axis = 0; axis < 4; ++axis) {
    search.tensor.value_strides[axis] = strides[axis];
  }
  parallel_for(p.batch * heads, effective_threads(p.batch * heads, p.num_threads), search_head<E>, &search,
               p.num_threads);
  bool any = false;
  for (int64_t i = 0; i < p.batch * heads; ++i) {
    any |= found[i];
  }
  return any;
}

inline bool hides_pairs(const AttentionParams& p) {
  return p.mask != nullptr || p.bias != nullptr || p.kv_lengths != nullptr || p.window_left < kUnbounded ||
         p.window_right < kUnbounded;
}

template <class E>
void backward(const BackwardParams& b) {
  const AttentionParams& p = b.forward;
  const int64_t query_rows = p.batch * p.query_heads * p.seqlen_q;
  const int64_t key_rows = p.batch * p.kv_heads * p.seqlen_k;
  const bool searches = hides_pairs(p);
  const Workspace flags(static_cast<size_t>(searches ? 2 * query_rows + key_rows + p.batch * p.query_heads : 1));
  BadRows bad{};
  if (searches) {
    auto* query = reinterpret_cast<bool*>(flags.data());
    bool* grad_out = query + query_rows;
    bool* key = grad_out + query_rows;
    bool* found = key + key_rows;
    const bool any =
        search_rows<E>(p, p.query, p.query_strides, p.query_heads, p.seqlen_q, p.head_dim, query, found) |
        search_rows<E>(p, b.grad_out, b.grad_out_strides, p.query_heads, p.seqlen_q, p.value_dim, grad_out, found) |
        search_rows<E>(p, p.key, p.key_strides, p.kv_heads, p.seqlen_k, p.head_dim, key, found);
    bad = any ? BadRows{query, grad_out, key} : BadRows{};
  }
  const BackwardPlan<E> plan = plan_backward<E>(b, bad.query != nullptr);
  const int64_t heads = p.batch * p.kv_heads;
  const int64_t thread_bytes = plan.threads * plan.thread_bytes;
  const Workspace workspace(static_cast<size_t>(thread_bytes + plan.wave * plan.head_bytes));
  BackwardCall<E> call{b, plan, bad, workspace.data(), workspace.data() + thread_bytes, 0};
  for (int64_t first = 0; first < heads; first += plan.wave) {
    const int64_t wave = min64(plan.wave, heads - first);
    call.first_head = first;
    parallel_for(wave * plan.head_panels, plan.threads, prepare_rows<E>, &call, p.num_threads);
    if (plan.pack_key || plan.pack_value || plan.clean_key) {
      parallel_for(wave * plan.blocks, plan.threads, prepare_keys<E>, &call, p.num_threads);
    }
    parallel_for(wave * plan.key_groups, plan.threads, run_key_group<E>, &call, p.num_threads);
    if (b.grad_query != nullptr) {
      parallel_for(wave * plan.head_panels, plan.threads, finish_query<E>, &call, p.num_threads);
    }
    if (b.grad_slopes != nullptr || b.grad_sinks != nullptr) {
      parallel_for(wave, plan.threads, finish_head<E>, &call, p.num_threads);
    }
  }
}

}  // namespace
}  // namespace fastattn
