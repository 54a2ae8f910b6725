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
  char* scratch;               // [threads][thread_bytes]
  char* packed;                // [wave][head_bytes]
  char* dense;                 // [dense_batches][dense_spans][span_panels][dense_bytes]
  char* sums;                  // [wave][head_tasks][panels][sums_bytes], where chunks are tasks
  int32_t* arrived;            // [wave][head_tasks / task_chunks]: chunks that are done
  int64_t first_head;          // of the wave, counted over batch and key/value heads
  int64_t heads;               // of the wave
  SharedChunks shared;         // where a task may have several sequences
  typename E::Scalar* scores;  // null, or [wave][rows of a key/value head][kept_stride], for few queries: they stay
};

// The keys of one tile of a sequence, up to `end`, whatever block it lies in; where the task packs for itself, these
// alone. The tile of a diagonal is the sequence's own, whoever shares the task's keys.
template <class E>
inline TileRows seed_keys(const ForwardTask<E>& task, int64_t batch, int64_t key, int64_t end) {
  const OperandLayout& layout = task.plan.layout;
  if (!task.plan.pack_in_task || !layout.pack_key) {
    return tile_keys<E>(task, task.whole, key);
  }
  char* packed = task.scratch + task.plan.tail_at;
  pack_keys<E>(task.p, batch, task.rows.kv_head, key, end, layout.key_row_bytes, packed);
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
    const int64_t end = min64(key + E::kKeys, existing_keys(task.p, panel.batch));
    enter_block<E>(panel, block);
    context.dense = dense_block<E>(panel, task.p, block, key, end, task.dense());
    seed_shift<E>(context, seed_keys<E>(task, panel.batch, key, end), key - block, wanted);
  }
}

// The probabilities as a result: scores once more, now under the final normaliser.
template <class E>
FASTATTN_NOINLINE void write_weights(const ForwardTask<E>& task, TileContext<E>& context,
                                     const Normaliser* normalisers) {
  using Scalar = typename E::Scalar;
  Panel<E>& panel = context.panel;
  Scalar scale[E::kLanes] = {};
  for (int lane = 0; lane < E::kLanes; ++lane) {
    panel.limit[lane] = static_cast<Scalar>(__builtin_inf());  // the shift is the one that the sums are under
  }
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
    store_weights<E>(panel, task.p, task.rows.batch, context.probs, scale, block, block,
                     min64(block + E::kBlockKeys, task.p.seqlen_k));
  }
}

// Scores of a key/value head's rows, where they stay.
inline int64_t head_scores(const AttentionParams& p) {
  return p.query_heads / p.kv_heads * p.seqlen_q * kept_stride(p);
}

// Rows [begin, end) of a head of the wave, all chunks of their keys.
template <class E>
inline ForwardTask<E> task_of_rows(const ForwardCall<E>& call, int64_t local_head, int64_t begin, int64_t end,
                                   int thread) {
  const ForwardPlan<E>& plan = call.plan;
  const AttentionParams& p = call.p;
  const int64_t head = call.first_head + local_head;
  const RowRange rows{head / p.kv_heads, head % p.kv_heads, begin, end};
  const int panels = static_cast<int>((end - begin + E::kLanes - 1) / E::kLanes);
  return {p,
          plan,
          rows,
          call.scratch + thread * plan.thread_bytes,
          whole_view<E>(p, plan.layout, rows.batch, rows.kv_head, call.packed + local_head * plan.head_bytes,
                        plan.packed_keys()),
          panels,
          existing_keys(p, rows.batch),
          0,
          plan.chunks,
          panels,
          {rows.batch},
          call.scores == nullptr ? nullptr : call.scores + local_head * head_scores(p)};
}

template <class E>
inline ForwardTask<E> make_task(const ForwardCall<E>& call, int64_t index, int thread) {
  const ForwardPlan<E>& plan = call.plan;
  const int64_t chunk = index % plan.task_chunks;
  const int64_t within = index % plan.head_tasks / plan.task_chunks;
  const int64_t span = within / plan.span_tasks;
  // The last rows first: under the causal rule they see most, and short tasks at the end even the threads out.
  const int64_t part = plan.span_tasks - 1 - within % plan.span_tasks;
  const int64_t task_rows = int64_t{plan.panels} * E::kLanes;
  const int64_t begin = span * plan.span_rows + part * task_rows;
  const int64_t end = min64(begin + task_rows, (span + 1) * plan.span_rows);
  ForwardTask<E> task = task_of_rows<E>(call, index / plan.head_tasks, begin, end, thread);
  if (plan.task_chunks > 1) {
    task.chunk_begin = chunk;
    task.chunk_end = chunk + 1;
  }
  if (plan.members > 1) {
    task.panels *= call.shared.members(chunk, task.rows.batch, task.sequences);
  }
  return task;
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
inline TileContext<E> tile_context(const ForwardTask<E>& task, int panel) {
  return {*task.panel(panel), task.plan.rules, {}, task.probs(), task.kept(), task.raw(), true, 0, {}};
}

// Places the rows of the task's panels and packs their queries.
template <class E>
inline void place_panels(const ForwardCall<E>& call, const ForwardTask<E>& task) {
  using Scalar = typename E::Scalar;
  const ForwardPlan<E>& plan = call.plan;
  for (int i = 0; i < task.panels; ++i) {
    Panel<E>& panel = *task.panel(i);
    const int64_t batch = task.sequences[i / task.sequence_panels];
    const int own = i % task.sequence_panels;
    const RowRange rows{batch, task.rows.kv_head, task.rows.begin, task.rows.end};
    panel.query = reinterpret_cast<Scalar*>(task.scratch + plan.query_at + i * plan.query_bytes);
    panel.output = reinterpret_cast<Scalar*>(task.scratch + plan.output_at) + i * E::kLanes * plan.rules.output_stride;
    place_rows<E>(panel, task.p, rows, rows.begin + own * E::kLanes);
    panel.dense = dense_table<E>(call, batch, task.rows.kv_head * plan.spans + task.rows.begin / plan.span_rows,
                                 task.rows.begin % plan.span_rows / E::kLanes + own);
    if (panel.first_min < panel.last_max) {  // some row of it sees a key
      if constexpr (E::kMethod == Method::rows) {
        copy_query<E>(panel, task.p, batch, plan.query_factor);
      } else {
        pack_query<E>(panel, task.p, batch, plan.query_factor);
      }
    }
  }
}

// Attends to keys [begin, end), starting anew.
template <class E>
inline void attend(const ForwardTask<E>& task, int64_t begin, int64_t end) {
  int64_t first = INT64_MAX;
  int64_t last = 0;
  for (int i = 0; i < task.panels; ++i) {
    Panel<E>& panel = *task.panel(i);
    start_softmax<E>(panel);
    const int64_t rows = E::kMethod == Method::tiles ? E::kLanes : round_up(panel.live, E::kRows);
    memset(panel.output, 0, sizeof(typename E::Scalar) * static_cast<size_t>(rows * task.plan.rules.output_stride));
    if constexpr (E::kMethod == Method::broadcast) {  // the others know a block's maximum before they need it
      if (task.plan.rules.alibi) {
        TileContext<E> context = tile_context<E>(task, i);
        seed_panel<E>(task, context);
      }
    }
    first = min64(first, panel.first_min);
    last = max64(last, panel.last_max);
  }
  first = max64(first, begin);
  last = min64(last, end);
  for (int64_t block = round_down(first, E::kBlockKeys); block < last; block += E::kBlockKeys) {
    const KeyValueView view = block_view<E>(task, block);
    for (int i = 0; i < task.panels; ++i) {
      TileContext<E> context = tile_context<E>(task, i);
      run_block<E>(task, context, view);
    }
  }
}

// Attends to the chunks of the task; afterwards the panels have the sums of all.
template <class E>
inline void attend_chunks(const ForwardTask<E>& task) {
  const ForwardPlan<E>& plan = task.plan;
  if (task.chunk_end - task.chunk_begin == 1) {
    attend<E>(task, task.chunk_begin * kChunkKeys<E>, plan.chunks == 1 ? INT64_MAX : task.chunk_end * kChunkKeys<E>);
    return;
  }
  for (int i = 0; i < task.panels; ++i) {
    const ChunkSums<E> sums = task.sums(i);
    sums.clear();
    memset(sums.output, 0, sizeof(typename E::Scalar) * static_cast<size_t>(E::kLanes * plan.rules.output_stride));
  }
  for (int64_t chunk = task.chunk_begin; chunk < task.chunk_end; ++chunk) {
    attend<E>(task, chunk * kChunkKeys<E>, (chunk + 1) * kChunkKeys<E>);
    for (int i = 0; i < task.panels; ++i) {
      Panel<E>& panel = *task.panel(i);
      add_chunk<E>(task.sums(i), ChunkSums<E>::of(panel), panel.live, plan.rules.output_stride, plan.rules.to_log2());
    }
  }
  for (int i = 0; i < task.panels; ++i) {
    Panel<E>& panel = *task.panel(i);
    const ChunkSums<E> sums = task.sums(i);
    memcpy(panel.shift, sums.shift, sizeof panel.shift);
    memcpy(panel.sum, sums.sum, sizeof panel.sum);
    panel.output = sums.output;
  }
}

// Puts what a sequence's panels have summed over the task's chunk, from panel `from` on, where the other chunks of its
// rows are; `index` is the task that is the sequence's own. The last to come adds all of them up in order, and has the
// panels with the result; the others are done.
template <class E>
inline bool gather_chunks(const ForwardCall<E>& call, const ForwardTask<E>& task, int from, int64_t index) {
  const ForwardPlan<E>& plan = call.plan;
  const int64_t stride = plan.rules.output_stride;
  const int64_t first = index - index % plan.task_chunks;
  const auto sums = [&](int64_t chunk, int panel) {
    return ChunkSums<E>::at(call.sums + ((first + chunk) * plan.panels + panel) * plan.sums_bytes);
  };
  for (int i = 0; i < task.sequence_panels; ++i) {
    Panel<E>& panel = *task.panel(from + i);
    const ChunkSums<E> own = sums(index - first, i);
    own.clear();
    add_chunk<E>(own, ChunkSums<E>::of(panel), panel.live, stride, 1);
  }
  if (__atomic_add_fetch(call.arrived + first / plan.task_chunks, 1, __ATOMIC_ACQ_REL) != plan.task_chunks) {
    return false;
  }
  for (int i = 0; i < task.sequence_panels; ++i) {
    Panel<E>& panel = *task.panel(from + i);
    const ChunkSums<E> whole = ChunkSums<E>::of(panel);
    const int64_t rows = E::kMethod == Method::tiles ? E::kLanes : panel.live;
    memset(panel.output, 0, sizeof(typename E::Scalar) * static_cast<size_t>(rows * stride));
    whole.clear();
    for (int64_t chunk = 0; chunk < plan.task_chunks; ++chunk) {
      add_chunk<E>(whole, sums(chunk, i), panel.live, stride, plan.rules.to_log2());
    }
  }
  return true;
}

// Output of a sequence's panels, from panel `from` on.
template <class E>
inline void finish_panels(const ForwardTask<E>& task, int from, int64_t batch) {
  for (int i = from; i < from + task.sequence_panels; ++i) {
    Normaliser normalisers[E::kLanes];
    finish_rows<E>(*task.panel(i), task.p, task.plan.rules, batch, normalisers);
    if (task.p.weights != nullptr) {
      TileContext<E> context = tile_context<E>(task, i);
      write_weights<E>(task, context, normalisers);
    }
  }
}

template <class E>
void run_task(void* opaque, int64_t index, int thread) {
  const auto& call = *static_cast<const ForwardCall<E>*>(opaque);
  const ForwardPlan<E>& plan = call.plan;
  const ForwardTask<E> task = make_task<E>(call, index, thread);
  if (plan.members > 1 && call.shared.follows(task.chunk_begin, task.rows.batch)) {
    return;  // the task of another sequence has it
  }
  E::enter();
  const typename E::V::FlushDenormals flush;
  task.finite().block = -1;
  place_panels<E>(call, task);
  attend_chunks<E>(task);
  for (int from = 0; from < task.panels; from += task.sequence_panels) {
    const int64_t batch = task.sequences[from / task.sequence_panels];
    const int64_t own = index + (batch - task.rows.batch) * task.p.kv_heads * plan.head_tasks;
    if (plan.task_chunks == 1 || gather_chunks<E>(call, task, from, own)) {
      finish_panels<E>(task, from, batch);
    }
  }
  E::leave();
}

// Where chunks are tasks, threads that take turns go each through chunks that follow one another: what a chunk asks for
// behind its last values are the keys of its thread's next one.
template <class E>
void run_turn(void* opaque, int64_t turn, int thread) {
  const auto& call = *static_cast<const ForwardCall<E>*>(opaque);
  const ForwardPlan<E>& plan = call.plan;
  int64_t index = turn;
  if (plan.task_chunks > 1) {
    const int64_t tasks = call.heads * plan.head_tasks;
    const int64_t part = turn % plan.threads;
    index = part * (tasks / plan.threads) + min64(part, tasks % plan.threads) + turn / plan.threads;
  }
  run_task<E>(opaque, index, thread);
}

// Packs one block of one head of the wave.
template <class E>
void pack_task(void* opaque, int64_t index, int /*thread*/) {
  const auto& call = *static_cast<const ForwardCall<E>*>(opaque);
  const AttentionParams& p = call.p;
  const OperandLayout& layout = call.plan.layout;
  const int64_t blocks = (call.plan.keys + E::kBlockKeys - 1) / E::kBlockKeys;
  const int64_t head = call.first_head + index / blocks;
  const int64_t begin = index % blocks * E::kBlockKeys;
  const int64_t end = min64(begin + E::kBlockKeys, existing_keys(p, head / p.kv_heads));
  const Interval seen = sequence_interval(p, head / p.kv_heads);
  if (begin >= seen.last || end <= seen.first) {
    return;
  }
  char* out = call.packed + index / blocks * call.plan.head_bytes;
  if (layout.pack_key) {
    pack_keys<E>(p, head / p.kv_heads, head % p.kv_heads, begin, end, layout.key_row_bytes,
                 out + begin * layout.key_row_bytes);
    out += call.plan.packed_keys() * layout.key_row_bytes;
  }
  if (layout.pack_value) {
    pack_values<E>(p, head / p.kv_heads, head % p.kv_heads, begin, end, layout.value_row_bytes, nullptr,
                   out + begin / E::kDepth * layout.value_row_bytes);
  }
}

// Makes the call's scratch, with `own_bytes` more, and goes through its heads in waves: run(call, heads, own).
template <class E, class Run>
inline void run_waves(const AttentionParams& p, const ForwardPlan<E>& plan, int64_t own_bytes, Run run) {
  const int64_t heads = p.batch * p.kv_heads;
  const int64_t thread_bytes = plan.threads * plan.thread_bytes;
  const int64_t packed_bytes = plan.wave * plan.head_bytes;
  const int64_t tables = plan.dense_batches * plan.dense_spans * plan.span_panels;
  const int64_t dense_bytes = round_up(tables * plan.dense_bytes, kScratchAlign);
  const int64_t sums_bytes = plan.wave * plan.all_sums_bytes();
  const int64_t counters = plan.task_chunks > 1 ? plan.wave * plan.head_tasks / plan.task_chunks : 0;
  const int64_t counters_bytes = counters * static_cast<int64_t>(sizeof(int32_t));
  const int64_t shared_bytes = plan.members > 1 ? SharedChunks::bytes(plan.chunks, p.batch) : 0;
  own_bytes = round_up(own_bytes, kScratchAlign);
  const Workspace workspace(static_cast<size_t>(thread_bytes + packed_bytes + dense_bytes + own_bytes + sums_bytes +
                                                shared_bytes + counters_bytes));
  char* packed = workspace.data() + thread_bytes;
  char* dense = packed + packed_bytes;
  char* own = dense + dense_bytes;
  char* sums = own + own_bytes;
  char* counted = sums + sums_bytes;
  ForwardCall<E> call{p, plan, workspace.data(), packed, dense, sums, reinterpret_cast<int32_t*>(counted), 0,
                      0, {},   nullptr};
  if (plan.members > 1) {
    call.shared = find_shared_chunks(p, plan.chunks, kChunkKeys<E>, counted + counters_bytes);
  }

  if (plan.dense_bytes > 0) {
    parallel_for(tables, plan.threads, dense_task<E>, &call, p.num_threads);
  }
  for (int64_t head = 0; head < heads; head += plan.wave) {
    const int64_t wave = min64(plan.wave, heads - head);
    call.first_head = head;
    call.heads = wave;
    memset(call.arrived, 0, static_cast<size_t>(counters_bytes));
    if (plan.head_bytes > 0) {
      const int64_t blocks = (plan.keys + E::kBlockKeys - 1) / E::kBlockKeys;
      parallel_for(wave * blocks, plan.threads, pack_task<E>, &call, p.num_threads);
    }
    run(call, wave, own);
  }
}

template <class E>
void run_forward(const AttentionParams& p) {
  if (p.batch == 0 || p.query_heads == 0 || p.seqlen_q == 0) {
    return;
  }
  const ForwardPlan<E> plan = plan_forward<E>(p);
  run_waves<E>(p, plan, 0, [&](ForwardCall<E>& call, int64_t wave, char* /*own*/) {
    parallel_for(wave * plan.head_tasks, plan.threads, run_turn<E>, &call, p.num_threads);
  });
}

}  // namespace
}  // namespace fastattn
