// Attention forward, once for every element type and ISA.
//
// Rows are cut into tasks of a few panels; a task walks over the key blocks that any of its rows sees, and for each
// panel computes scores, probabilities and their product with the values. Tiles that no row sees are never visited,
// tiles that every row sees wholly are never masked. Key blocks and tiles start at fixed multiples and each row's
// arithmetic depends on that row alone, so the bits of a result do not depend on threads, tasks, neighbours or how
// operands are packed.
#pragma once

#include "algorithm/block.h"
#include "algorithm/finish.h"
#include "algorithm/plan.h"
#include "params.h"

namespace fastattn {
namespace {

// What the tasks of one wave share.
template <class E>
struct ForwardCall {
  const AttentionParams& p;
  const ForwardPlan<E>& plan;
  char* scratch;       // [threads][thread_bytes]
  char* packed;        // [wave][head_bytes]
  char* dense;         // [dense_batches][dense_spans][span_panels][dense_bytes]
  int64_t first_head;  // of the wave, counted over batch and key/value heads
};

// The keys of one tile, whatever block it lies in; where the task packs for itself, these alone.
template <class E>
inline TileRows seed_keys(const ForwardTask<E>& task, int64_t key) {
  const OperandLayout& layout = task.plan.layout;
  if (!task.plan.pack_in_task || !layout.pack_key) {
    return tile_keys<E>(task, task.whole, key);
  }
  char* packed = task.scratch + task.plan.tail_at;
  pack_keys<E>(task.p, task.rows.batch, task.rows.kv_head, key, min64(key + E::kKeys, task.p.seqlen_k),
               layout.key_row_bytes, packed);
  return {packed, layout.key_row_bytes};
}

// ALiBi: the shift of every lane from the tile of its diagonal.
template <class E>
FASTATTN_NOINLINE void seed_panel(const ForwardTask<E>& task, TileContext<E>& context) {
  Panel<E>& panel = context.panel;
  int64_t tiles[E::kLanes];
  bool done[E::kLanes] = {};
  for (int lane = 0; lane < E::kLanes; ++lane) {
    const int64_t nearest = clamp64(panel.position[lane], panel.first[lane], max64(panel.last[lane] - 1, 0));
    tiles[lane] = round_down(nearest, E::kBlockKeys) + round_down(nearest % E::kBlockKeys, E::kKeys);
    done[lane] = panel.first[lane] >= panel.last[lane];
  }
  for (int lane = 0; lane < E::kLanes; ++lane) {
    if (done[lane]) {
      continue;
    }
    const int64_t key = tiles[lane];
    bool wanted[E::kLanes];
    for (int other = 0; other < E::kLanes; ++other) {
      wanted[other] = !done[other] && tiles[other] == key;
      done[other] |= wanted[other];
    }
    const int64_t block = round_down(key, E::kBlockKeys);
    const int64_t end = min64(key + E::kKeys, task.block_end(block));
    enter_block<E>(panel, block);
    context.dense = dense_block<E>(panel, task.p, block, key, end, task.dense());
    seed_shift<E>(context, seed_keys<E>(task, key), key - block, wanted);
  }
}

// The probabilities as a result: scores once more, now under the final normaliser.
template <class E>
FASTATTN_NOINLINE void write_weights(const ForwardTask<E>& task, TileContext<E>& context,
                                     const Normaliser* normalisers) {
  using Scalar = typename E::Scalar;
  Panel<E>& panel = context.panel;
  Scalar scale[E::kLanes] = {};
  for (int lane = 0; lane < panel.live; ++lane) {
    scale[lane] = static_cast<Scalar>(normalisers[lane].inverse);
  }
  for (int64_t block = 0; block < task.p.seqlen_k; block += E::kBlockKeys) {
    memset(context.probs, 0, sizeof(Scalar) * E::kPlanes * kPlaneSize<E>);
    int64_t begin;
    int64_t end;
    if (prepare_block<E>(task, context, block, &begin, &end)) {
      score_block<E>(task, context, block_view<E>(task, block), begin, end);
    }
    store_weights<E>(panel, task.p, task.rows.batch, context.probs, scale, block, block, task.block_end(block));
  }
}

template <class E>
inline ForwardTask<E> make_task(const ForwardCall<E>& call, int64_t index, int thread) {
  const ForwardPlan<E>& plan = call.plan;
  const AttentionParams& p = call.p;
  const int64_t local_head = index / plan.head_tasks;
  const int64_t head = call.first_head + local_head;
  const int64_t within = index % plan.head_tasks;
  const int64_t span = within / plan.span_tasks;
  // The last rows first: under the causal rule they see most, and short tasks at the end even the threads out.
  const int64_t part = plan.span_tasks - 1 - within % plan.span_tasks;
  const int64_t task_rows = int64_t{plan.panels} * E::kLanes;
  const int64_t begin = span * plan.span_rows + part * task_rows;
  const int64_t end = min64(begin + task_rows, (span + 1) * plan.span_rows);
  const RowRange rows{head / p.kv_heads, head % p.kv_heads, begin, end};
  const int panels = static_cast<int>((end - begin + E::kLanes - 1) / E::kLanes);
  return {p,
          plan,
          rows,
          call.scratch + thread * plan.thread_bytes,
          whole_view<E>(p, plan.layout, rows.batch, rows.kv_head, call.packed + local_head * plan.head_bytes),
          panels};
}

// Where mask and bias of a panel of a span stand transposed; null where each task reads them for itself.
template <class E>
inline char* dense_table(const ForwardCall<E>& call, int64_t batch, int64_t span, int64_t panel) {
  const ForwardPlan<E>& plan = call.plan;
  if (plan.dense_bytes == 0) {
    return nullptr;
  }
  const int64_t table = batch % plan.dense_batches * plan.dense_spans + span % plan.dense_spans;
  return call.dense + (table * plan.span_panels + panel) * plan.dense_bytes;
}

// Fills the table of one panel.
template <class E>
void dense_task(void* opaque, int64_t index, int /*thread*/) {
  const auto& call = *static_cast<const ForwardCall<E>*>(opaque);
  const AttentionParams& p = call.p;
  const ForwardPlan<E>& plan = call.plan;
  const int64_t at = index % plan.span_panels;
  const int64_t span = index / plan.span_panels % plan.dense_spans;
  const int64_t batch = index / plan.span_panels / plan.dense_spans;
  const int64_t first = span % plan.spans * plan.span_rows;
  Panel<E> panel;
  place_rows<E>(panel, p, {batch, span / plan.spans, first, first + plan.span_rows}, first + at * E::kLanes);
  char* table = dense_table<E>(call, batch, span, at);
  const int64_t keys = round_up(p.seqlen_k, E::kBlockKeys);
  for (int64_t block = 0; block < p.seqlen_k; block += E::kBlockKeys) {
    read_dense<E>(panel, p, block, block, min64(block + E::kBlockKeys, p.seqlen_k),
                  DenseRoom<E>::at(table, p, keys, block));
  }
}

template <class E>
void run_task(void* opaque, int64_t index, int thread) {
  using Scalar = typename E::Scalar;
  const auto& call = *static_cast<const ForwardCall<E>*>(opaque);
  const ForwardPlan<E>& plan = call.plan;
  const ForwardTask<E> task = make_task<E>(call, index, thread);
  E::enter();
  const typename E::V::FlushDenormals flush;
  task.finite().block = -1;
  const int64_t batch = task.rows.batch;
  int64_t first = INT64_MAX;
  int64_t last = 0;
  for (int i = 0; i < task.panels; ++i) {
    Panel<E>& panel = *task.panel(i);
    panel.query = reinterpret_cast<Scalar*>(task.scratch + plan.query_at + i * plan.query_bytes);
    panel.output = reinterpret_cast<Scalar*>(task.scratch + plan.output_at) + i * E::kLanes * plan.rules.output_stride;
    place_rows<E>(panel, task.p, task.rows, task.rows.begin + i * E::kLanes);
    panel.dense = dense_table<E>(call, batch, task.rows.kv_head * plan.spans + task.rows.begin / plan.span_rows,
                                 task.rows.begin % plan.span_rows / E::kLanes + i);
    if (panel.first_min < panel.last_max) {  // some row of it sees a key
      if constexpr (E::kMethod == Method::rows) {
        copy_query<E>(panel, task.p, batch, plan.query_factor);
      } else {
        pack_query<E>(panel, task.p, batch, plan.query_factor);
      }
    }
    const int64_t rows = E::kMethod == Method::tiles ? E::kLanes : round_up(panel.live, E::kRows);
    memset(panel.output, 0, sizeof(Scalar) * static_cast<size_t>(rows * plan.rules.output_stride));
    if constexpr (E::kMethod == Method::broadcast) {  // the others know a block's maximum before they need it
      if (plan.rules.alibi) {
        TileContext<E> context{panel, plan.rules, {}, task.probs(), task.kept(), task.raw(), true, 0, {}};
        seed_panel<E>(task, context);
      }
    }
    first = min64(first, panel.first_min);
    last = max64(last, panel.last_max);
  }
  for (int64_t block = round_down(first, E::kBlockKeys); block < last; block += E::kBlockKeys) {
    const KeyValueView view = block_view<E>(task, block);
    for (int i = 0; i < task.panels; ++i) {
      TileContext<E> context{*task.panel(i), plan.rules, {}, task.probs(), task.kept(), task.raw(), true, 0, {}};
      run_block<E>(task, context, view);
    }
  }
  for (int i = 0; i < task.panels; ++i) {
    Normaliser normalisers[E::kLanes];
    Panel<E>& panel = *task.panel(i);
    finish_rows<E>(panel, task.p, plan.rules, batch, normalisers);
    if (task.p.weights != nullptr) {
      TileContext<E> context{panel, plan.rules, {}, task.probs(), task.kept(), task.raw(), true, 0, {}};
      write_weights<E>(task, context, normalisers);
    }
  }
  E::leave();
}

// Packs one block of one head of the wave.
template <class E>
void pack_task(void* opaque, int64_t index, int /*thread*/) {
  const auto& call = *static_cast<const ForwardCall<E>*>(opaque);
  const AttentionParams& p = call.p;
  const OperandLayout& layout = call.plan.layout;
  const int64_t blocks = (p.seqlen_k + E::kBlockKeys - 1) / E::kBlockKeys;
  const int64_t head = call.first_head + index / blocks;
  const int64_t begin = index % blocks * E::kBlockKeys;
  const int64_t end = min64(begin + E::kBlockKeys, p.seqlen_k);
  const Interval seen = sequence_interval(p, head / p.kv_heads);
  if (begin >= seen.last || end <= seen.first) {
    return;
  }
  char* out = call.packed + index / blocks * call.plan.head_bytes;
  if (layout.pack_key) {
    pack_keys<E>(p, head / p.kv_heads, head % p.kv_heads, begin, end, layout.key_row_bytes,
                 out + begin * layout.key_row_bytes);
    out += round_up(p.seqlen_k, E::kHeadMultiple) * layout.key_row_bytes;
  }
  if (layout.pack_value) {
    pack_values<E>(p, head / p.kv_heads, head % p.kv_heads, begin, end, layout.value_row_bytes, nullptr,
                   out + begin / E::kDepth * layout.value_row_bytes);
  }
}

template <class E>
void run_forward(const AttentionParams& p) {
  if (p.batch == 0 || p.query_heads == 0 || p.seqlen_q == 0) {
    return;
  }
  const ForwardPlan<E> plan = plan_forward<E>(p);
  const int64_t heads = p.batch * p.kv_heads;
  const int64_t thread_bytes = plan.threads * plan.thread_bytes;
  const int64_t packed_bytes = plan.wave * plan.head_bytes;
  const int64_t tables = plan.dense_batches * plan.dense_spans * plan.span_panels;
  const Workspace workspace(static_cast<size_t>(thread_bytes + packed_bytes + tables * plan.dense_bytes));
  char* packed = workspace.data() + thread_bytes;
  ForwardCall<E> call{p, plan, workspace.data(), packed, packed + packed_bytes, 0};
  if (plan.dense_bytes > 0) {
    parallel_for(tables, plan.threads, dense_task<E>, &call, p.num_threads);
  }
  for (int64_t head = 0; head < heads; head += plan.wave) {
    const int64_t wave = min64(plan.wave, heads - head);
    call.first_head = head;
    if (plan.head_bytes > 0) {
      const int64_t blocks = (p.seqlen_k + E::kBlockKeys - 1) / E::kBlockKeys;
      parallel_for(wave * blocks, plan.threads, pack_task<E>, &call, p.num_threads);
    }
    parallel_for(wave * plan.head_tasks, plan.threads, run_task<E>, &call, p.num_threads);
  }
}

}  // namespace
}  // namespace fastattn
