// Attention backward, once for every element type and ISA.
//
// The probabilities are computed again from the scores and the log-sum-exp. A task takes every so-many-th key block of
// one key/value head, and over all rows that see it adds up dK and dV, which are then complete, and the part of dQ that
// these keys give. How key blocks are dealt to tasks depends on the number of keys alone, and parts are added in a
// fixed order, so the bits of a result do not depend on threads or neighbours.
#pragma once

#include "algorithm/bias_gradient.h"
#include "algorithm/far_levels.h"
#include "algorithm/finish.h"
#include "algorithm/gradient_block.h"

namespace fastattn {
namespace {

// Rows of a gradient, scaled and rounded to their type.
template <class E>
inline void store_grads(const typename E::Scalar* rows, int64_t row_stride, int64_t count, int64_t columns,
                        double scale, void* tensor, const int64_t* strides, int64_t offset) {
  for (int64_t i = 0; i < count; ++i) {
    store_row<E>(rows + i * row_stride, scale, columns,
                 static_cast<typename E::Source*>(tensor) + offset + i * strides[2], strides[3]);
  }
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
    const int64_t block = dealt(round, group, plan.key_groups) * E::kBlockKeys;
    if (block >= plan.blocks * E::kBlockKeys) {
      continue;
    }
    const int64_t block_end = min64(block + E::kBlockKeys, p.seqlen_k);
    const int64_t rows = round_up(block_end - block, E::kKeys);
    memset(grad_key, 0, sizeof(Scalar) * static_cast<size_t>(rows * plan.head_dim));
    memset(grad_value, 0, sizeof(Scalar) * static_cast<size_t>(rows * plan.value_dim));
    for (int64_t span = 0; span < plan.spans; ++span) {
      for (int64_t first = 0; first < plan.span_panels; first += plan.panels) {
        GradientBlock<E> g = gradient_block<E>(head, scratch, group, span * plan.span_panels + first,
                                               min64(plan.panels, plan.span_panels - first), block);
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
  const int64_t first = head.kv_head * heads;
  double* slopes = b.grad_slopes == nullptr ? nullptr : b.grad_slopes + head.batch * p.query_heads;
  double* sinks = b.grad_sinks == nullptr ? nullptr : b.grad_sinks + head.batch * p.query_heads;
  for (int64_t h = 0; h < heads; ++h) {
    if (sinks != nullptr) {
      sinks[first + h] = 0;
    }
    if (slopes != nullptr) {
      slopes[first + h] = 0;
      for (int64_t group = 0; group < plan.key_groups; ++group) {
        slopes[first + h] += head.slopes(group)[h];
      }
    }
  }
  for (int64_t i = 0; i < plan.head_panels; ++i) {
    const Panel<E>& panel = head.panel(i);
    const auto* delta = head.scalars(plan.delta_at) + i * E::kLanes;
    for (int lane = 0; lane < panel.live; ++lane) {
      const double share = sinks == nullptr ? 0 : sink_share<E>(head, panel, i, lane);
      if (share != 0) {  // of the normaliser, for which no value answers; that may be rounded to less than the sink is
        sinks[panel.head[lane]] -= (share < 1 ? share : 1) * static_cast<double>(delta[lane]);
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
inline RowSearch<E> row_search(const AttentionParams& p, const void* tensor, const int64_t* strides, int64_t heads,
                               int64_t rows, int64_t columns, bool* bad, bool* found) {
  RowSearch<E> search{p, heads, bad, found};
  search.tensor.value = tensor;
  search.tensor.seqlen_k = rows;
  search.tensor.value_dim = columns;
  for (int axis = 0; axis < 4; ++axis) {
    search.tensor.value_strides[axis] = strides[axis];
  }
  return search;
}

// The search of a call, where some pair is hidden: of queries, dO and keys.
template <class E>
struct BadSearch {
  RowSearch<E> rows[3];

  int64_t tasks(int i) const { return rows[i].tensor.batch * rows[i].heads; }

  // What was found.
  BadRows result() const {
    for (const RowSearch<E>& search : rows) {
      for (int64_t i = 0; i < search.tensor.batch * search.heads; ++i) {
        if (search.found[i]) {
          return {rows[0].bad, rows[1].bad, rows[2].bad};
        }
      }
    }
    return {};
  }
};

inline bool hides_pairs(const AttentionParams& p) {
  return p.mask != nullptr || p.bias != nullptr || p.kv_lengths != nullptr || p.kv_starts != nullptr ||
         p.query_lengths != nullptr || p.segment_ranges != nullptr || p.window_left < kUnbounded ||
         p.window_right < kUnbounded;
}

// Bytes that a search notes its findings in; 0 where there is none.
inline int64_t search_bytes(const AttentionParams& p) {
  const int64_t query_heads = p.batch * p.query_heads;
  const int64_t kv_heads = p.batch * p.kv_heads;
  return hides_pairs(p) ? 2 * query_heads * (p.seqlen_q + 1) + kv_heads * (p.seqlen_k + 1) : 0;
}

template <class E>
inline BadSearch<E> bad_search(const BackwardParams& b, char* flags) {
  const AttentionParams& p = b.forward;
  auto* query = reinterpret_cast<bool*>(flags);
  bool* grad_out = query + p.batch * p.query_heads * p.seqlen_q;
  bool* key = grad_out + p.batch * p.query_heads * p.seqlen_q;
  bool* found = key + p.batch * p.kv_heads * p.seqlen_k;
  const int64_t heads = p.batch * p.query_heads;
  return {{row_search<E>(p, p.query, p.query_strides, p.query_heads, p.seqlen_q, p.head_dim, query, found),
           row_search<E>(p, b.grad_out, b.grad_out_strides, p.query_heads, p.seqlen_q, p.value_dim, grad_out,
                         found + heads),
           row_search<E>(p, p.key, p.key_strides, p.kv_heads, p.seqlen_k, p.head_dim, key, found + 2 * heads)}};
}

// What there is to do for the heads of a call, in order.
struct BackwardStep {
  int64_t tasks;
  TaskFn run;
};
constexpr int kBackwardSteps = 7;
constexpr int kGroupStep = 3;  // which of them has most of the work

template <class E>
inline BackwardStep backward_step(const BackwardCall<E>& call, int step) {
  const BackwardPlan<E>& plan = call.plan;
  const BackwardParams& b = call.b;
  const int64_t panels = call.head_count * plan.head_panels;
  switch (step) {
    case 0:
      return {panels, prepare_rows<E>};
    case 1:
      return {plan.pack_key || plan.pack_value || plan.pack_steps ? call.head_count * plan.blocks : 0, prepare_keys<E>};
    case 2:
      return {b.forward.bias != nullptr || b.forward.alibi_slopes != nullptr ? panels : 0, settle_levels<E>};
    case kGroupStep:
      return {call.head_count * plan.key_groups, run_key_group<E>};
    case 4:
      return {b.grad_bias != nullptr ? bias_tasks<E>(call) : 0, run_bias_tile<E>};
    case 5:
      return {b.grad_query != nullptr ? panels : 0, finish_query<E>};
    default:
      return {b.grad_slopes != nullptr || b.grad_sinks != nullptr ? call.head_count : 0, finish_head<E>};
  }
}

// One head from end to end, in scratch that stays in the thread's cache.
template <class E>
void run_head(void* opaque, int64_t index, int thread) {
  const auto& call = *static_cast<const BackwardCall<E>*>(opaque);
  char* room = call.heads + thread * call.room_bytes;
  BackwardCall<E> own{call.b, call.plan, call.bad, call.threads, room, call.room_bytes, index, 1};
  for (int step = 0; step < kBackwardSteps; ++step) {
    const BackwardStep all = backward_step<E>(own, step);
    for (int64_t task = 0; task < all.tasks; ++task) {
      all.run(&own, task, thread);
    }
  }
}

template <class E>
void run_backward(const BackwardParams& b) {
  const AttentionParams& p = b.forward;
  const Workspace flags(static_cast<size_t>(search_bytes(p)));
  BadRows bad{};
  if (search_bytes(p) > 0) {
    BadSearch<E> search = bad_search<E>(b, flags.data());
    for (int i = 0; i < 3; ++i) {
      parallel_for(search.tasks(i), effective_threads(search.tasks(i), p.num_threads), search_head<E>, &search.rows[i],
                   p.num_threads);
    }
    bad = search.result();
  }
  const BackwardPlan<E> plan = plan_backward<E>(b, bad.query != nullptr);
  const int64_t heads = p.batch * p.kv_heads;
  const int64_t thread_bytes = plan.threads * plan.thread_bytes;
  const int64_t rooms = plan.whole_heads ? plan.threads : plan.wave;
  const Workspace workspace(static_cast<size_t>(thread_bytes + rooms * plan.head_bytes));
  BackwardCall<E> call{b, plan, bad, workspace.data(), workspace.data() + thread_bytes, plan.head_bytes, 0, heads};
  if (plan.whole_heads) {
    parallel_for(heads, plan.threads, run_head<E>, &call, p.num_threads);
    return;
  }
  for (int64_t first = 0; first < heads; first += plan.wave) {
    call.first_head = first;
    call.head_count = min64(plan.wave, heads - first);
    for (int step = 0; step < kBackwardSteps; ++step) {
      const BackwardStep all = backward_step<E>(call, step);
      if (all.tasks > 0) {
        parallel_for(all.tasks, plan.threads, all.run, &call, p.num_threads);
      }
    }
  }
}

}  // namespace
}  // namespace fastattn
