// Attention forward, once for every element type and ISA.
//
// Rows are cut into tasks of a few panels; a task walks over the key blocks that any of its rows sees, and for each
// panel computes scores, probabilities and their product with the values. Tiles that no row sees are never visited,
// tiles that every row sees wholly are never masked. Key blocks and tiles start at fixed multiples and each row's
// arithmetic depends on that row alone, so the bits of a result do not depend on threads, tasks, neighbours or how
// operands are packed.
#pragma once

#include "algorithm/dense_block.h"
#include "algorithm/finish.h"
#include "algorithm/operands.h"
#include "algorithm/panel.h"
#include "algorithm/row_softmax.h"
#include "algorithm/score_tile.h"
#include "algorithm/value_tile.h"
#include "parallel.h"
#include "workspace.h"

namespace fastattn {
namespace {

// Panels a task may hold: they share each key block while it is in the L2 cache.
constexpr int kMaxPanels = 4;

// Rows from which keys and values that are not adjacent rows (the "bshd" layout) are worth copying first.
constexpr int64_t kCopyStridedRows = 256;

// The score tiles of one call: where every row sees every key, and where some row does not see some key.
template <class E>
struct TileFns {
  TileFn<E> plain;
  TileFn<E> masked;
  PassFn<E> scan_plain;  // these three for Method::tiles
  PassFn<E> scan_masked;
  PassFn<E> exponentiate;
};

// How one call is cut.
template <class E>
struct ForwardPlan {
  OperandLayout layout;
  ScoreRules<E> rules;
  TileFns<E> tiles[E::kVectors];  // for panels of 1, ... kVectors vectors of live lanes
  double query_factor;
  int panels;          // of a task
  int64_t spans;       // stretches of rows a key/value head falls into: one a query head, or one for all
  int64_t span_rows;   // rows of a span
  int64_t span_tasks;  // tasks of a span
  int64_t head_tasks;  // tasks of a key/value head
  bool pack_in_task;   // a key/value head has one task, which packs block by block into its own scratch
  int64_t wave;        // key/value heads whose operands are packed at once
  int threads;
  // byte offsets of a thread's scratch
  int64_t query_bytes;  // of a panel
  int64_t query_at, output_at, probs_at, raw_at, visible_at, bias_at, tail_at, clean_at, packed_at, thread_bytes;
};

template <class E>
inline void plan_scratch(ForwardPlan<E>& plan, const AttentionParams& p) {
  using Scalar = typename E::Scalar;
  constexpr auto kScalar = static_cast<int64_t>(sizeof(Scalar));
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const int64_t start = bytes;
    bytes += round_up(size, kScratchAlign);
    return start;
  };
  take(plan.panels * static_cast<int64_t>(sizeof(Panel<E>)));
  plan.query_bytes = padded_head_dim<E>(p) / E::kDepth * E::kLanes * kScalar;
  plan.query_at = take(plan.panels * plan.query_bytes);
  plan.output_at = take(plan.panels * E::kLanes * plan.rules.output_stride * kScalar);
  plan.probs_at = take(E::kPlanes * kPlaneSize<E> * kScalar);
  plan.raw_at = take(E::kMethod == Method::tiles ? int64_t{E::kBlockKeys} * E::kLanes * kScalar : 0);
  plan.visible_at = take(p.mask != nullptr || p.bias != nullptr ? E::kBlockKeys * 4 : 0);
  plan.bias_at = take(p.bias != nullptr ? int64_t{E::kLanes} * E::kBlockKeys * kScalar : 0);
  plan.tail_at = take(E::kKeys * plan.layout.key_row_bytes);
  plan.clean_at = take(E::kBlockKeys / E::kDepth * plan.layout.value_row_bytes);
  plan.packed_at = take(plan.pack_in_task ? plan.layout.head_bytes(E::kBlockKeys, E::kDepth) : 0);
  // A page between threads keeps their lines apart.
  plan.thread_bytes = round_up(bytes, 4096);
}

template <class E, int kActive>
inline TileFns<E> choose_tiles(bool general) {
  TileFns<E> fns{};
  if constexpr (E::kMethod == Method::tiles) {
    fns.scan_plain = general ? scan_tile<E, TileKind::general, kActive> : scan_tile<E, TileKind::plain, kActive>;
    fns.scan_masked = general ? scan_tile<E, TileKind::general, kActive> : scan_tile<E, TileKind::masked, kActive>;
    fns.exponentiate = general ? exponentiate_tile<E, true, kActive> : exponentiate_tile<E, false, kActive>;
  } else if constexpr (E::kMethod == Method::broadcast) {
    fns.plain = general ? score_tile<E, TileKind::general, kActive> : score_tile<E, TileKind::plain, kActive>;
    fns.masked = general ? score_tile<E, TileKind::general, kActive> : score_tile<E, TileKind::masked, kActive>;
  }
  return fns;
}

template <class E>
inline ForwardPlan<E> plan_forward(const AttentionParams& p) {
  using Scalar = typename E::Scalar;
  ForwardPlan<E> plan{};
  const int64_t group = p.query_heads / p.kv_heads;
  plan.layout = operand_layout<E>(p, group * p.seqlen_q >= kCopyStridedRows);
  const bool general = p.bias != nullptr || p.alibi_slopes != nullptr || p.softcap > 0;
  plan.rules.natural = general;
  const double factor = p.scale * (general ? 1.0 : kLog2E);
  // The product that cannot take the scale into the query takes its sign, since a maximum must stay one.
  plan.query_factor = E::Product::kScaleQuery ? factor : (factor < 0 ? -1.0 : 1.0);
  // At least the smallest normal number: 0 would turn a hidden score, -inf, into NaN.
  const double magnitude = factor < -0x1p-126 ? -factor : factor > 0x1p-126 ? factor : 0x1p-126;
  plan.rules.factor = static_cast<Scalar>(E::Product::kScaleQuery ? 1.0 : magnitude);
  plan.rules.steps = E::kMethod == Method::rows ? p.head_dim : padded_head_dim<E>(p) / E::kDepth;
  plan.rules.softcap = static_cast<Scalar>(p.softcap);
  plan.rules.alibi = p.alibi_slopes != nullptr;
  plan.rules.output_stride = padded_value_dim<E>(p);
  plan.tiles[0] = choose_tiles<E, 1>(general);
  plan.tiles[E::kVectors - 1] = choose_tiles<E, E::kVectors>(general);

  // Short sequences: rows of the heads that share keys stand side by side in the lanes.
  const bool together = p.seqlen_q < 4 * E::kLanes;
  plan.spans = together ? 1 : group;
  plan.span_rows = together ? group * p.seqlen_q : p.seqlen_q;
  const int64_t heads = p.batch * p.kv_heads * plan.spans;
  const int64_t span_panels = (plan.span_rows + E::kLanes - 1) / E::kLanes;
  plan.panels = static_cast<int>(min64(kMaxPanels, span_panels));
  while (plan.panels > 1 && heads * ((span_panels + plan.panels - 1) / plan.panels) < 2 * p.num_threads) {
    plan.panels /= 2;
  }
  plan.span_tasks = (span_panels + plan.panels - 1) / plan.panels;
  plan.head_tasks = plan.spans * plan.span_tasks;
  const bool packs = plan.layout.pack_key || plan.layout.pack_value;
  plan.pack_in_task = packs && plan.head_tasks == 1;
  const int64_t all_heads = p.batch * p.kv_heads;
  const int64_t head_bytes =
      packs && !plan.pack_in_task ? plan.layout.head_bytes(round_up(p.seqlen_k, E::kHeadMultiple), E::kDepth) : 0;
  plan.wave = head_bytes == 0 ? all_heads : clamp64(kPackedBudget / head_bytes, 1, all_heads);
  plan.threads = effective_threads(plan.wave * plan.head_tasks, p.num_threads);
  plan_scratch<E>(plan, p);
  return plan;
}

// What the tasks of one wave share.
template <class E>
struct ForwardCall {
  const AttentionParams& p;
  const ForwardPlan<E>& plan;
  char* scratch;  // [threads][thread_bytes]
  char* packed;   // [wave][head_bytes]
  int64_t head_bytes;
  int64_t first_head;  // of the wave, counted over batch and key/value heads
};

// One task at work: its scratch and where it stands.
template <class E>
struct ForwardTask {
  using Scalar = typename E::Scalar;
  const AttentionParams& p;
  const ForwardPlan<E>& plan;
  RowRange rows;
  char* scratch;
  KeyValueView whole;
  int panels;

  Panel<E>* panel(int i) const { return reinterpret_cast<Panel<E>*>(scratch) + i; }
  Scalar* probs() const { return reinterpret_cast<Scalar*>(scratch + plan.probs_at); }
  Scalar* raw() const { return reinterpret_cast<Scalar*>(scratch + plan.raw_at); }
  uint32_t* visible() const { return reinterpret_cast<uint32_t*>(scratch + plan.visible_at); }
  Scalar* bias() const { return reinterpret_cast<Scalar*>(scratch + plan.bias_at); }
  int64_t block_end(int64_t block) const { return min64(block + E::kBlockKeys, p.seqlen_k); }
};

// Keys and values of the block, which starts at the view's start.
template <class E>
inline KeyValueView block_view(const ForwardTask<E>& task, int64_t block) {
  const OperandLayout& layout = task.plan.layout;
  KeyValueView view = task.whole;
  view.start = block;
  view.key += block * view.key_stride;
  view.value += block / E::kDepth * view.value_stride;
  if (!task.plan.pack_in_task) {
    return view;
  }
  char* packed = task.scratch + task.plan.packed_at;
  const int64_t end = task.block_end(block);
  if (layout.pack_key) {
    view.key = packed;
    pack_keys<E>(task.p, task.rows.batch, task.rows.kv_head, block, end, layout.key_row_bytes, packed);
    packed += E::kBlockKeys * layout.key_row_bytes;
  }
  if (layout.pack_value) {
    view.value = packed;
    pack_values<E>(task.p, task.rows.batch, task.rows.kv_head, block, end, layout.value_row_bytes, nullptr, packed);
  }
  return view;
}

// The kKeys key rows from `key` on; where they lie in the caller's tensor and reach past its end, a padded copy.
template <class E>
inline TileRows tile_keys(const ForwardTask<E>& task, const KeyValueView& view, int64_t key) {
  const char* from = view.key + (key - view.start) * view.key_stride;
  if (task.plan.layout.pack_key || key + E::kKeys <= task.p.seqlen_k) {
    return {from, view.key_stride};
  }
  const int64_t row_bytes = task.plan.layout.key_row_bytes;
  char* copy = task.scratch + task.plan.tail_at;
  for (int64_t r = 0; r < E::kKeys; ++r) {
    if (key + r < task.p.seqlen_k) {
      memcpy(copy + r * row_bytes, from + r * view.key_stride, static_cast<size_t>(row_bytes));
    } else {
      memset(copy + r * row_bytes, 0, static_cast<size_t>(row_bytes));
    }
  }
  return {copy, row_bytes};
}

enum class Sight { none, some, all };

// How much of the tile at `key` the panel's rows see.
template <class E>
inline Sight tile_sight(const Panel<E>& panel, const uint32_t* visible, int64_t block, int64_t key) {
  if (key >= panel.last_max || key + E::kKeys <= panel.first_min) {
    return Sight::none;
  }
  bool all = key >= panel.first_max && key + E::kKeys <= panel.last_min;
  if (visible != nullptr) {
    uint32_t any_bits = 0;
    uint32_t all_bits = ~0U;
    for (int r = 0; r < E::kKeys; ++r) {
      any_bits |= visible[key - block + r];
      all_bits &= visible[key - block + r];
    }
    constexpr uint32_t kAll = E::kLanes == 32 ? ~0U : (1U << E::kLanes) - 1U;
    if ((any_bits & kAll) == 0) {
      return Sight::none;
    }
    all &= (all_bits & kAll) == kAll;
  }
  return all ? Sight::all : Sight::some;
}

// Probabilities 0 for the tile at `block_key`.
template <class E>
inline void clear_probs(typename E::Scalar* probs, int64_t block_key) {
  for (int plane = 0; plane < E::kPlanes; ++plane) {
    for (int lane = 0; lane < E::kLanes; lane += E::kRows) {
      memset(probs + plane * kPlaneSize<E> + prob_index<E>(lane, block_key) / E::kDepth, 0,
             sizeof(typename E::Scalar) * E::kKeys / E::kDepth * E::kRows);
    }
  }
}

// Keys of a block, relative to it: [begin, end) hold probabilities; within them, those of [guard_begin, guard_end) are
// hidden from some row.
struct BlockExtent {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t guard_begin = 0;
  int64_t guard_end = 0;

  void guard(int64_t from, int64_t to) {
    guard_begin = guard_end == 0 ? from : guard_begin;
    guard_end = to;
  }
};

// A matrix unit takes a block's products in one go: it and the vector units get in each other's way when their
// instructions mix tile by tile (a third of the speed, measured). The block's peak is then known before its first
// exponential.
template <class E>
inline void score_products(const ForwardTask<E>& task, TileContext<E>& context, const TileFns<E>& fns,
                           const KeyValueView& view, int64_t begin, int64_t end) {
  const int64_t block = view.start;
  const bool wide = context.panel.live > E::kWidth;
  auto* multiply = wide ? multiply_keys_to<E, E::kVectors> : multiply_keys_to<E, 1>;
  for (int64_t key = begin; key < end; key += E::kKeys) {
    if (tile_sight<E>(context.panel, context.dense.visible, block, key) != Sight::none) {
      const TileRows rows = tile_keys<E>(task, view, key);
      multiply(context.raw + (key - block) * E::kLanes, rows.rows, rows.stride, context.panel, context.rules.steps);
    }
  }
  for (auto& peak : context.peaks) {
    peak = -static_cast<typename E::Scalar>(__builtin_inf());
  }
  for (int64_t key = begin; key < end; key += E::kKeys) {
    const Sight sight = tile_sight<E>(context.panel, context.dense.visible, block, key);
    if (sight != Sight::none) {
      (sight == Sight::all ? fns.scan_plain : fns.scan_masked)(context, key - block);
    }
  }
  context.written = begin - block;
  (context.rules.natural ? follow_block_peak<E, true> : follow_block_peak<E, false>)(context);
}

// The same for rows.
template <class E>
inline BlockExtent score_rows(const ForwardTask<E>& task, TileContext<E>& context, const KeyValueView& view,
                              int64_t begin, int64_t end) {
  const int64_t block = view.start;
  BlockExtent extent;
  extent.begin = begin - block;
  extent.end = round_up(end - block, E::kKeys);
  for (int64_t key = begin; key < end; key += E::kKeys) {
    const Sight sight = tile_sight<E>(context.panel, context.dense.visible, block, key);
    if (sight != Sight::all) {
      extent.guard(key - block, key - block + E::kKeys);
    }
    if (sight != Sight::none) {
      const TileRows rows = tile_keys<E>(task, view, key);
      multiply_keys_to<E, 1>(context.probs + (key - block), rows.rows, rows.stride, context.panel, context.rules.steps);
    }
  }
  row_softmax<E>(context, extent.begin, extent.end, extent.guard_end > 0);
  return extent;
}

// Probabilities of one panel over one key block.
template <class E>
inline BlockExtent score_block(const ForwardTask<E>& task, TileContext<E>& context, const KeyValueView& view,
                               int64_t begin, int64_t end) {
  if constexpr (E::kMethod == Method::rows) {
    return score_rows<E>(task, context, view, begin, end);
  }
  BlockExtent extent;
  bool started = false;
  bool gap = false;
  const int64_t block = view.start;
  const TileFns<E>& fns = task.plan.tiles[(context.panel.live + E::kWidth - 1) / E::kWidth - 1];
  if constexpr (E::kMethod == Method::tiles) {
    score_products<E>(task, context, fns, view, begin, end);
  }
  for (int64_t key = begin; key < end; key += E::kKeys) {
    const int64_t block_key = key - block;
    const Sight sight = tile_sight<E>(context.panel, context.dense.visible, block, key);
    if (sight == Sight::none) {
      if (started) {
        clear_probs<E>(context.probs, block_key);
        gap = true;
      }
      continue;
    }
    if (!started) {
      started = true;
      extent.begin = context.written = block_key;
    }
    if (sight == Sight::some || gap) {
      extent.guard(gap ? extent.end : block_key, block_key + E::kKeys);
      gap = false;
    }
    if constexpr (E::kMethod == Method::tiles) {
      fns.exponentiate(context, block_key);
    } else {
      (sight == Sight::all ? fns.plain : fns.masked)(context, tile_keys<E>(task, view, key), block_key);
    }
    extent.end = block_key + E::kKeys;
  }
  return extent;
}

// Whether a lane sees a key of the block, by the rules alone.
template <class E>
inline bool lane_sees(const Panel<E>& panel, const uint32_t* visible, int64_t block, int lane, int64_t block_key) {
  const int64_t key = block + block_key;
  return key >= panel.first[lane] && key < panel.last[lane] &&
         (visible == nullptr || ((visible[block_key] >> lane) & 1U) != 0);
}

template <class E>
inline void add_values(const ForwardTask<E>& task, const TileContext<E>& context, const KeyValueView& view,
                       const BlockExtent& extent) {
  const int64_t stride = task.plan.rules.output_stride;
  const OperandLayout& layout = task.plan.layout;
  const int64_t keys = task.block_end(view.start) - view.start;
  const int64_t end = min64(extent.end, keys);
  if (extent.guard_end > 0) {
    bool bad[E::kBlockKeys] = {};
    if (find_nonfinite<E>(task.p, task.rows.batch, task.rows.kv_head, view.start + extent.guard_begin,
                          view.start + min64(extent.guard_end, keys), bad + extent.guard_begin)) {
      accumulate_guarded<E>(context.panel, context.probs, task.p, layout, task.rows.batch, task.rows.kv_head,
                            view.start, extent.begin, end, stride, bad, task.scratch + task.plan.clean_at,
                            [&](int lane, int64_t key) {
                              return lane_sees<E>(context.panel, context.dense.visible, view.start, lane, key);
                            });
      return;
    }
  }
  accumulate_values<E>(context.panel, context.probs, view, extent.begin, end, task.p.value_dim, stride,
                       layout.pack_value);
}

// Enters a key block: the keys of it that the panel sees at all, and its dense arguments. False if there are none.
template <class E>
inline bool prepare_block(const ForwardTask<E>& task, TileContext<E>& context, int64_t block, int64_t* begin,
                          int64_t* end) {
  Panel<E>& panel = context.panel;
  const int64_t block_end = task.block_end(block);
  *begin = block + round_down(clamp64(panel.first_min - block, 0, E::kBlockKeys), E::kKeys);
  *end = min64(panel.last_max, block_end);
  if (*begin >= *end) {
    return false;
  }
  enter_block<E>(panel, block);
  context.dense =
      read_dense<E>(panel, task.p, block, *begin, min64(block + round_up(*end - block, E::kKeys), block_end),
                    task.visible(), task.bias());
  return true;
}

template <class E>
inline void run_block(const ForwardTask<E>& task, TileContext<E>& context, const KeyValueView& view) {
  int64_t begin;
  int64_t end;
  if (!prepare_block<E>(task, context, view.start, &begin, &end)) {
    return;
  }
  const BlockExtent extent = score_block<E>(task, context, view, begin, end);
  Panel<E>& panel = context.panel;
  if (extent.end > extent.begin) {
    add_values<E>(task, context, view, extent);
  }
  for (int lane = 0; lane < E::kLanes; ++lane) {
    panel.sum[lane] += panel.block_sum[lane];
  }
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
    context.dense = read_dense<E>(panel, task.p, block, key, end, task.visible(), task.bias());
    seed_shift<E>(context, tile_keys<E>(task, block_view<E>(task, block), key), key - block, wanted);
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
          whole_view<E>(p, plan.layout, rows.batch, rows.kv_head, call.packed + local_head * call.head_bytes),
          panels};
}

template <class E>
void run_task(void* opaque, int64_t index, int thread) {
  using Scalar = typename E::Scalar;
  const auto& call = *static_cast<const ForwardCall<E>*>(opaque);
  const ForwardPlan<E>& plan = call.plan;
  const ForwardTask<E> task = make_task<E>(call, index, thread);
  E::enter();
  const int64_t batch = task.rows.batch;
  int64_t first = INT64_MAX;
  int64_t last = 0;
  for (int i = 0; i < task.panels; ++i) {
    Panel<E>& panel = *task.panel(i);
    panel.query = reinterpret_cast<Scalar*>(task.scratch + plan.query_at + i * plan.query_bytes);
    panel.output = reinterpret_cast<Scalar*>(task.scratch + plan.output_at) + i * E::kLanes * plan.rules.output_stride;
    place_rows<E>(panel, task.p, task.rows, task.rows.begin + i * E::kLanes);
    if constexpr (E::kMethod == Method::rows) {
      copy_query<E>(panel, task.p, batch, plan.query_factor);
    } else {
      pack_query<E>(panel, task.p, batch, plan.query_factor);
    }
    memset(panel.output, 0, sizeof(Scalar) * E::kLanes * static_cast<size_t>(plan.rules.output_stride));
    if (E::kMethod == Method::broadcast && plan.rules.alibi) {
      TileContext<E> context{panel, plan.rules, {}, task.probs(), task.raw(), 0, {}};
      seed_panel<E>(task, context);
    }
    first = min64(first, panel.first_min);
    last = max64(last, panel.last_max);
  }
  for (int64_t block = round_down(first, E::kBlockKeys); block < last; block += E::kBlockKeys) {
    const KeyValueView view = block_view<E>(task, block);
    for (int i = 0; i < task.panels; ++i) {
      TileContext<E> context{*task.panel(i), plan.rules, {}, task.probs(), task.raw(), 0, {}};
      run_block<E>(task, context, view);
    }
  }
  for (int i = 0; i < task.panels; ++i) {
    Normaliser normalisers[E::kLanes];
    Panel<E>& panel = *task.panel(i);
    finish_rows<E>(panel, task.p, plan.rules, batch, normalisers);
    if (task.p.weights != nullptr) {
      TileContext<E> context{panel, plan.rules, {}, task.probs(), task.raw(), 0, {}};
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
  char* out = call.packed + index / blocks * call.head_bytes;
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
  const bool packs = (plan.layout.pack_key || plan.layout.pack_value) && !plan.pack_in_task;
  const int64_t head_bytes =
      packs ? round_up(plan.layout.head_bytes(round_up(p.seqlen_k, E::kHeadMultiple), E::kDepth), kScratchAlign) : 0;
  const int64_t thread_bytes = plan.threads * plan.thread_bytes;
  const Workspace workspace(static_cast<size_t>(thread_bytes + plan.wave * head_bytes));
  ForwardCall<E> call{p, plan, workspace.data(), workspace.data() + thread_bytes, head_bytes, 0};
  for (int64_t head = 0; head < heads; head += plan.wave) {
    const int64_t wave = min64(plan.wave, heads - head);
    call.first_head = head;
    if (packs) {
      const int64_t blocks = (p.seqlen_k + E::kBlockKeys - 1) / E::kBlockKeys;
      parallel_for(wave * blocks, plan.threads, pack_task<E>, &call);
    }
    parallel_for(wave * plan.head_tasks, plan.threads, run_task<E>, &call);
  }
}

// Up to this many queries, keys and values are read where they lie and each query pays for itself; above it, a panel's
// lanes fill. Decided by the number of queries alone, so that a row's bits do not depend on how many heads share its
// keys.
constexpr int64_t kFewQueries = 4;

template <class Few, class Many>
void forward(const AttentionParams& p) {
  (p.seqlen_q <= kFewQueries ? run_forward<Few> : run_forward<Many>)(p);
}

}  // namespace
}  // namespace fastattn
