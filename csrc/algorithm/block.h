// One panel over one key block: which tiles to visit, their probabilities, and the product with the values.
#pragma once

#include "algorithm/plan.h"
#include "algorithm/row_softmax.h"
#include "algorithm/value_tile.h"

namespace fastattn {
namespace {

// One task at work: its scratch and where it stands.
template <class E>
struct ForwardTask {
  using Scalar = typename E::Scalar;
  const AttentionParams& p;
  const ForwardPlan<E>& plan;
  RowRange rows;
  char* scratch;
  KeyValueView whole;
  int panels;           // of all sequences
  int64_t keys;         // that exist
  int64_t chunk_begin;  // the chunks that are this task's, [begin, end)
  int64_t chunk_end;
  int sequence_panels;             // panels of each
  int64_t sequences[kMaxMembers];  // that share the task's keys, its own first
  Scalar* scores;                  // null, or where those of the key/value head's rows stay, [rows][kept_stride]

  Panel<E>* panel(int i) const { return reinterpret_cast<Panel<E>*>(scratch) + i; }
  Scalar* probs() const { return reinterpret_cast<Scalar*>(scratch + plan.probs_at); }
  Scalar* kept() const { return reinterpret_cast<Scalar*>(scratch + plan.kept_at); }
  Scalar* raw() const { return reinterpret_cast<Scalar*>(scratch + plan.raw_at); }
  char* dense() const { return scratch + plan.dense_at; }
  FiniteValues<E>& finite() const { return *reinterpret_cast<FiniteValues<E>*>(scratch + plan.finite_at); }
  RowTable<E>& table() const { return *reinterpret_cast<RowTable<E>*>(scratch + plan.table_at); }
  ChunkSums<E> sums(int i) const { return ChunkSums<E>::at(scratch + plan.sums_at + i * plan.sums_bytes); }
  int64_t block_end(int64_t block) const { return min64(block + E::kBlockKeys, keys); }
};

// Method::rows: finds every row of the block, wherever it stands.
template <class E>
inline void list_block(const ForwardTask<E>& task, KeyValueView& view) {
  RowTable<E>& table = task.table();
  constexpr int64_t kNext = sizeof table.next / sizeof *table.next;
  constexpr auto kSize = static_cast<int64_t>(sizeof(typename E::Stored));
  const AttentionParams& p = task.p;
  // What is read: whole groups of sums, and what is asked for ahead, of values up to 3 * kRowsAhead.
  const int64_t existing = task.block_end(view.start) - view.start;
  const int64_t count = min64(E::kBlockKeys, round_up(existing, 16) + 3 * kRowsAhead<E>);
  const auto list = [&](bool copied, const char* row, int64_t step, const void* tensor, const int64_t* strides,
                        const char** rows) {
    if (copied) {
      list_copied_rows(row, step, existing, count, rows);
    } else {
      list_rows(p, tensor, strides, kSize, task.rows.batch, task.rows.kv_head, view.start, task.keys, count, rows);
    }
  };
  list(task.plan.layout.pack_key, view.key, view.key_stride, p.key, p.key_strides, table.keys);
  list(task.plan.layout.pack_value, view.value, view.value_stride, p.value, p.value_strides, table.values);
  const int64_t next = view.start + E::kBlockKeys;
  if (task.plan.layout.pack_key || next >= task.keys) {
    list_copied_rows(table.keys[0], 0, 1, kNext, table.next);
  } else {
    list_rows(p, p.key, p.key_strides, kSize, task.rows.batch, task.rows.kv_head, next, task.keys, kNext, table.next);
  }
  if constexpr (E::kQuantised) {
    list_scales<E>(p, task.rows.batch, task.rows.kv_head, view.start, task.block_end(view.start), table);
  }
  const auto adjacent = [&](bool copied, const int64_t* strides, int64_t columns) {
    const bool runs = p.block_table == nullptr || p.page_size * columns * kSize >= kAdjacentBytes;
    return copied || (runs && strides[2] == columns);
  };
  view.keys_adjacent = adjacent(task.plan.layout.pack_key, p.key_strides, p.head_dim);
  view.values_adjacent = adjacent(task.plan.layout.pack_value, p.value_strides, p.value_dim);
  view.key_rows = table.keys;
  view.value_rows = table.values;
  view.stored = p.kv_dtype;
}

// Keys and values of the block, which starts at the view's start, as they lie or are packed.
template <class E>
inline KeyValueView packed_block(const ForwardTask<E>& task, int64_t block) {
  const OperandLayout& layout = task.plan.layout;
  KeyValueView view = task.whole;
  view.start = block;
  if (!task.plan.pack_in_task) {
    view.key += view.key == nullptr ? 0 : block * view.key_stride;  // null: in pages
    view.value += view.value == nullptr ? 0 : block / E::kDepth * view.value_stride;
    return view;
  }
  view.key += layout.pack_key || view.key == nullptr ? 0 : block * view.key_stride;
  view.value += layout.pack_value || view.value == nullptr ? 0 : block / E::kDepth * view.value_stride;
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

template <class E>
inline KeyValueView block_view(const ForwardTask<E>& task, int64_t block) {
  KeyValueView view = packed_block<E>(task, block);
  if constexpr (E::kMethod == Method::rows) {
    list_block<E>(task, view);
  }
  return view;
}

// The kKeys key rows from `key` on; where they lie in the caller's tensor and reach past its end, a padded copy. A tile
// that reaches past the end is masked, but numbers left over there may be such as take a hundred times as long to
// multiply. The last row alone is its own padding.
template <class E>
inline TileRows tile_keys(const ForwardTask<E>& task, const KeyValueView& view, int64_t key) {
  const char* from = view.key + (key - view.start) * view.key_stride;
  if (task.plan.layout.pack_key || key + E::kKeys <= task.p.seqlen_k) {
    return {from, view.key_stride};
  }
  if (key + 1 == task.p.seqlen_k) {
    return {from, 0};
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

// How much of the tile at `key` the panel's rows see.
template <class E>
inline Sight tile_sight(const TileContext<E>& context, int64_t block, int64_t key) {
  const Panel<E>& panel = context.panel;
  if (key >= panel.last_max || key + E::kKeys <= panel.first_min) {
    return Sight::none;
  }
  const Sight sight = context.dense.sights != nullptr ? context.dense.sights[(key - block) / E::kKeys] : Sight::all;
  const bool inside = key >= panel.first_max && key + E::kKeys <= panel.last_min;
  return inside || sight == Sight::none ? sight : Sight::edge;
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

// What a panel sees of a block: keys [begin, end), relative to the block, hold probabilities.
template <class E>
struct BlockExtent {
  int64_t begin = 0;
  int64_t end = 0;
  bool guarded[E::kBlockKeys / E::kKeys] = {};  // tiles of them that are hidden from some row
  bool poisoned = false;                        // and have values that a probability of 0 does not silence
};

// Notes that some row does not see the tiles of [begin, end).
template <class E>
inline void guard_tiles(const ForwardTask<E>& task, BlockExtent<E>& extent, int64_t begin, int64_t end) {
  using Tile = typename FiniteValues<E>::Tile;
  if (task.p.out == nullptr) {
    return;  // nobody asked for the product with the values
  }
  FiniteValues<E>& finite = task.finite();
  for (int64_t key = begin; key < end; key += E::kKeys) {
    const int64_t tile = key / E::kKeys;
    extent.guarded[tile] = true;
    if (finite.tiles[tile] == Tile::unknown) {
      const int64_t from = finite.block + key;
      const bool found = find_nonfinite<E>(task.p, task.rows.batch, task.rows.kv_head, from,
                                           min64(from + E::kKeys, task.keys), finite.bad + key);
      finite.tiles[tile] = found ? Tile::nonfinite : Tile::finite;
    }
    extent.poisoned |= finite.tiles[tile] == Tile::nonfinite;
  }
}

// Few queries: rows of keys that a later tile multiplies. Inline by force: gcc drops calls of functions that do nothing
// but prefetch, as if they did nothing at all.
template <class E>
FASTATTN_INLINE void prefetch_keys(const ForwardTask<E>& task, const TileContext<E>& context, const KeyValueView& view,
                                   int64_t block_key) {
  if (task.p.seqlen_q < kManyQueries && &context.panel == task.panel(0) && !task.plan.layout.pack_key) {
    for (int64_t r = 0; r < E::kKeys; ++r) {
      prefetch_row(view.key + (block_key + r + kPrefetchRows) * view.key_stride, task.plan.layout.key_row_bytes);
    }
  }
}

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
    if (tile_sight<E>(context, block, key) != Sight::none) {
      const TileRows rows = tile_keys<E>(task, view, key);
      multiply(context.raw + (key - block) * E::kLanes, rows.rows, rows.stride, context.panel, context.rules.steps);
    }
  }
  for (auto& peak : context.peaks) {
    peak = -static_cast<typename E::Scalar>(__builtin_inf());
  }
  for (int64_t key = begin; key < end; key += E::kKeys) {
    const Sight sight = tile_sight<E>(context, block, key);
    if (sight != Sight::none) {
      context.edge = sight == Sight::edge;
      (sight == Sight::all ? fns.scan_plain : fns.scan_masked)(context, key - block);
    }
  }
  context.written = begin - block;
  (context.rules.natural ? follow_block_peak<E, true> : follow_block_peak<E, false>)(context);
}

// The same for engines that observe.
template <class E>
inline void keep_scores(const ForwardTask<E>& task, TileContext<E>& context, const TileFns<E>& fns,
                        const KeyValueView& view, int64_t begin, int64_t end) {
  const int64_t block = view.start;
  context.raw = context.panel.group_scores(block);
  for (auto& peak : context.peaks) {
    peak = -static_cast<typename E::Scalar>(__builtin_inf());
  }
  for (int64_t key = begin; key < end; key += E::kKeys) {
    const Sight sight = tile_sight<E>(context, block, key);
    if (sight != Sight::none) {
      context.edge = sight == Sight::edge;
      prefetch_keys<E>(task, context, view, key - block);
      (sight == Sight::all ? fns.keep_plain : fns.keep_masked)(context, tile_keys<E>(task, view, key), key - block);
    }
  }
  context.written = begin - block;
  (context.rules.natural ? follow_block_peak<E, true> : follow_block_peak<E, false>)(context);
}

// The same for rows.
template <class E>
inline BlockExtent<E> score_rows(const ForwardTask<E>& task, TileContext<E>& context, const KeyValueView& view,
                                 int64_t begin, int64_t end) {
  const int64_t block = view.start;
  BlockExtent<E> extent;
  extent.begin = begin - block;
  extent.end = round_up(end - block, E::kKeys);
  bool hides = false;
  int64_t seen = 0, first = 0;  // tiles one behind the other, which are multiplied together
  const auto multiply = [&] {
    if (seen > 0) {
      multiply_stored_rows<E>(context.probs, context.panel, view, first, first + seen * E::kKeys, task.p.head_dim);
    }
  };
  const Panel<E>& panel = context.panel;
  const bool sees_all = context.dense.sights == nullptr && begin >= panel.first_max && end <= panel.last_min &&
                        (end - begin) % E::kKeys == 0 && !(E::kQuantised && task.table().odd_scales);
  first = begin - block;
  seen = sees_all ? (end - begin) / E::kKeys : 0;
  for (int64_t key = begin; !sees_all && key < end; key += E::kKeys) {
    const Sight sight = tile_sight<E>(context, block, key);
    hides |= sight != Sight::all;
    if (sight != Sight::all || (E::kQuantised && task.table().odd_scales)) {
      guard_tiles<E>(task, extent, key - block, key - block + E::kKeys);
    }
    if (sight == Sight::none) {
      multiply();
      seen = 0;
    } else {
      first = seen == 0 ? key - block : first;
      ++seen;
    }
  }
  multiply();
  const float* scales[2] = {};
  if constexpr (E::kQuantised) {
    scales[0] = task.table().key_scales;
    scales[1] = task.table().value_scales;
  }
  // Adjacent rows have not been asked for; of others the first have, and without pairs the rest will be.
  const bool adjacent = view.values_adjacent;
  if (task.p.out != nullptr && (adjacent || E::Dot::kPairsValues) && &context.panel == task.panel(0)) {
    const int64_t bytes = task.p.value_dim * static_cast<int64_t>(sizeof(typename E::Stored));
    const int64_t first = adjacent ? 0 : kRowsAhead<E>;
    const int64_t end = kRowsAhead<E> + rows_of_softmax<E>(context.panel.live, bytes);
    context.fetch = {view.value_rows + first, end - first, bytes};
  }
  row_softmax<E>(context, extent.begin, extent.end, hides, scales, task.scores != nullptr, [&](int lane) {
    const int64_t head = panel.head[lane] - task.rows.kv_head * (task.p.query_heads / task.p.kv_heads);
    return task.scores + (head * task.p.seqlen_q + panel.row[lane]) * kept_stride(task.p) + block;
  });
  return extent;
}

// Probabilities of one panel over one key block.
template <class E>
inline BlockExtent<E> score_block(const ForwardTask<E>& task, TileContext<E>& context, const KeyValueView& view,
                                  int64_t begin, int64_t end) {
  if constexpr (E::kMethod == Method::rows) {
    return score_rows<E>(task, context, view, begin, end);
  }
  BlockExtent<E> extent;
  bool started = false;
  const int64_t block = view.start;
  const TileFns<E>& fns = task.plan.tiles[(context.panel.live + E::kWidth - 1) / E::kWidth - 1];
  bool scored = E::kMethod == Method::tiles;
  if constexpr (E::kMethod == Method::tiles) {
    score_products<E>(task, context, fns, view, begin, end);
  }
  if constexpr (E::kObserves) {
    scored = context.panel.starting;
    if (scored) {
      keep_scores<E>(task, context, fns, view, begin, end);
    }
  }
  for (int64_t key = begin; key < end; key += E::kKeys) {
    const int64_t block_key = key - block;
    const Sight sight = tile_sight<E>(context, block, key);
    if (sight == Sight::none) {
      if (started) {
        clear_probs<E>(context.probs, block_key);
      }
      if constexpr (E::kObserves) {
        context.panel.skip_group(block, block_key, context.panel.shift);
      }
      continue;
    }
    if (!started) {
      started = true;
      extent.begin = extent.end = context.written = block_key;
    }
    // Tiles between two that are seen hold probabilities of 0.
    guard_tiles<E>(task, extent, extent.end, sight == Sight::all ? block_key : block_key + E::kKeys);
    if (scored) {
      fns.exponentiate(context, block_key);
    } else {
      context.edge = sight == Sight::edge;
      prefetch_keys<E>(task, context, view, block_key);
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
                       const BlockExtent<E>& extent) {
  const int64_t stride = task.plan.rules.output_stride;
  const OperandLayout& layout = task.plan.layout;
  const int64_t keys = task.block_end(view.start) - view.start;
  const int64_t end = min64(extent.end, keys);
  if (FASTATTN_UNLIKELY(extent.poisoned)) {
    bool bad[E::kBlockKeys] = {};
    for (int64_t key = extent.begin; key < end; ++key) {
      bad[key] = extent.guarded[key / E::kKeys] && task.finite().bad[key];
    }
    accumulate_guarded<E>(context.panel, context.probs, task.p, layout, task.rows.batch, task.rows.kv_head, view.start,
                          extent.begin, end, stride, bad, task.scratch + task.plan.clean_at,
                          [&](int lane, int64_t key) {
                            return lane_sees<E>(context.panel, context.dense.visible, view.start, lane, key);
                          });
    return;
  }
  accumulate_values<E>(context.panel, context.probs, view, extent.begin, end, task.p.value_dim, stride,
                       layout.pack_value);
}

// The keys of a block that the panel sees at all; whether there are any.
template <class E>
inline bool seen_of_block(const ForwardTask<E>& task, const Panel<E>& panel, int64_t block, int64_t* begin,
                          int64_t* end) {
  *begin = block + round_down(clamp64(panel.first_min - block, 0, E::kBlockKeys), E::kKeys);
  *end = min64(panel.last_max, task.block_end(block));
  return *begin < *end;
}

// Enters a key block, with its dense arguments. False if the panel sees none of it.
template <class E>
inline bool prepare_block(const ForwardTask<E>& task, TileContext<E>& context, int64_t block, int64_t* begin,
                          int64_t* end) {
  Panel<E>& panel = context.panel;
  const int64_t block_end = task.block_end(block);
  if (!seen_of_block<E>(task, panel, block, begin, end)) {
    return false;
  }
  enter_block<E>(panel, block);
  task.finite().enter(block);
  context.dense = dense_block<E>(panel, task.p, block, *begin,
                                 min64(block + round_up(*end - block, E::kKeys), block_end), task.dense());
  return true;
}

template <class E>
inline void run_block(const ForwardTask<E>& task, TileContext<E>& context, const KeyValueView& view) {
  int64_t begin;
  int64_t end;
  if (!prepare_block<E>(task, context, view.start, &begin, &end)) {
    return;
  }
  const BlockExtent<E> extent = score_block<E>(task, context, view, begin, end);
  Panel<E>& panel = context.panel;
  if (extent.end > extent.begin && task.p.out != nullptr) {
    add_values<E>(task, context, view, extent);
  }
  for (int lane = 0; lane < panel.placed; ++lane) {
    panel.sum[lane] += panel.block_sum[lane];
  }
  if constexpr (E::kObserves) {
    panel.leave_block(view.start);
  }
}

}  // namespace
}  // namespace fastattn
