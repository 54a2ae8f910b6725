// One panel over one key block: which tiles to visit, their probabilities, and the product with the values.
#pragma once

#include "algorithm/dense_block.h"
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
  for (int lane = 0; lane < panel.placed; ++lane) {
    panel.sum[lane] += panel.block_sum[lane];
  }
}

}  // namespace
}  // namespace fastattn
