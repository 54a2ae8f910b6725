// A panel: up to kLanes query rows that are computed side by side, one a lane, with what each may see and how far its
// softmax has come. Rows may belong to different heads of one key/value head.
#pragma once

#include "algorithm/observe.h"
#include "algorithm/operands.h"

namespace fastattn {
namespace {

template <class E>
struct Panel : Observation<E> {
  using Scalar = typename E::Scalar;
  static constexpr int kLanes = E::kLanes;

  // State of the softmax, a lane each. `shift` is what is subtracted from the scores, 0 while no key was seen; `limit`
  // is the score above which it moves, -inf while no key was seen.
  alignas(64) Scalar shift[kLanes];
  Scalar limit[kLanes];
  Scalar sum[kLanes];        // of unrounded probabilities, over finished key blocks
  Scalar block_sum[kLanes];  // over the running one
  // The keys each lane sees, [first, last), and its position, all relative to the running key block.
  Scalar block_first[kLanes];
  Scalar block_last[kLanes];
  Scalar block_position[kLanes];
  Scalar slope[kLanes];        // ALiBi
  Scalar query_scale[kLanes];  // of queries that became integers
  double beyond[kLanes];  // what ALiBi adds for the distance between a position outside of the keys and the nearest key

  int live;    // lanes in use; the others repeat the last of these, and their results are dropped
  int placed;  // lanes that have a row: whole vectors of them, all where a row has more than a place
  int64_t head[kLanes];
  int64_t row[kLanes];
  int64_t position[kLanes];  // row + query offset
  int64_t nearest[kLanes];   // the key nearest to it
  int64_t first[kLanes];
  int64_t last[kLanes];
  int64_t first_min, first_max, last_min, last_max;
  int64_t segment[kLanes];  // where there are segments whose keys do not stand side by side
  int64_t segment_min, segment_max;
  const uint8_t* mask_row[kLanes];
  const char* bias_row[kLanes];
  int64_t block;  // first key of the running key block
  int64_t batch;
  int64_t first_head;  // of the batch, as dropout counts them
  char* dense;         // null, or a DenseRoom that holds mask and bias for all keys
  bool scattered;      // some lane's interval holds keys of other segments
  bool mask_shared;    // every lane reads the same mask row
  bool bias_shared;

  // How far a position lies outside of the keys.
  double overshoot(int lane) const {
    const auto distance = static_cast<double>(position[lane] - nearest[lane]);
    return distance < 0 ? -distance : distance;
  }

  Scalar* query;   // operands: [padded D / depth][kLanes], or see query_row_lanes for Method::rows
  Scalar* output;  // sums of p * v, see output_index
};

// Which rows the panels of one task hold. Rows of the heads that share a key/value head count through: head * Lq + row.
struct RowRange {
  int64_t batch;
  int64_t kv_head;
  int64_t begin;
  int64_t end;
};

// Keys [first, last); none if last <= first.
struct Interval {
  int64_t first;
  int64_t last;
};

// The keys that a row sees by the window, the start and the length. Neither end falls from row to row.
inline Interval rule_interval(const AttentionParams& p, int64_t batch, int64_t row) {
  const int64_t position = row + p.query_offset[batch];
  const int64_t length = existing_keys(p, batch);
  const int64_t start = p.kv_starts != nullptr ? max64(p.kv_starts[batch], 0) : 0;
  return {p.window_left >= kUnbounded ? start : clamp64(position - p.window_left, start, length),
          p.window_right >= kUnbounded ? length : clamp64(position + p.window_right + 1, 0, length)};
}

inline int64_t query_length(const AttentionParams& p, int64_t batch) {
  return p.query_lengths != nullptr ? min64(p.query_lengths[batch], p.seqlen_q) : p.seqlen_q;
}

// The same within the row's segment. That of a row without keys starts behind all and ends before all of them, so that
// its neighbours in a panel decide what the panel visits.
inline Interval visible_interval(const AttentionParams& p, int64_t batch, int64_t row) {
  Interval seen = rule_interval(p, batch, row);
  if (p.segment_ranges != nullptr) {
    const SegmentRange& own = p.segment_ranges[batch * p.seqlen_q + row];
    seen = {max64(seen.first, own.first), min64(seen.last, own.last)};
  }
  return seen.first < seen.last && row < query_length(p, batch) ? seen : Interval{p.seqlen_k, 0};
}

// What the rows of a sequence see together, or more.
inline Interval sequence_interval(const AttentionParams& p, int64_t batch) {
  const int64_t rows = query_length(p, batch);
  return rows > 0 ? Interval{rule_interval(p, batch, 0).first, rule_interval(p, batch, rows - 1).last} : Interval{0, 0};
}

// Mask, bias, ALiBi and segments of the lanes, once these have their rows.
template <class E>
FASTATTN_NOINLINE void place_extras(Panel<E>& panel, const AttentionParams& p, int64_t b) {
  using Scalar = typename E::Scalar;
  const int64_t bias_size = size_of(p.bias_dtype);
  for (int lane = 0; lane < panel.placed; ++lane) {
    const int64_t head = panel.head[lane];
    const int64_t row = panel.row[lane];
    if (p.mask != nullptr) {
      panel.mask_row[lane] = p.mask + b * p.mask_strides[0] + head * p.mask_strides[1] + row * p.mask_strides[2];
      panel.mask_shared &= panel.mask_row[lane] == panel.mask_row[0];
    }
    if (p.bias != nullptr) {
      const int64_t offset = b * p.bias_strides[0] + head * p.bias_strides[1] + row * p.bias_strides[2];
      panel.bias_row[lane] = static_cast<const char*>(p.bias) + offset * bias_size;
      panel.bias_shared &= panel.bias_row[lane] == panel.bias_row[0];
    }
    if (p.alibi_slopes != nullptr) {
      const double slope = p.alibi_slopes[b * p.alibi_strides[0] + head * p.alibi_strides[1]];
      constexpr double kLargest = sizeof(Scalar) == sizeof(double) ? __DBL_MAX__ : __FLT_MAX__;
      // An infinite one would hide the key at its own position, whose distance is 0.
      panel.slope[lane] = static_cast<Scalar>(slope < -kLargest ? -kLargest : slope < kLargest ? slope : kLargest);
      panel.beyond[lane] = -slope * panel.overshoot(lane);
    }
    if (p.scattered_segments) {
      panel.segment[lane] = p.query_segments[b * p.segment_strides[0] + row];
      panel.segment_min = min64(panel.segment_min, panel.segment[lane]);
      panel.segment_max = max64(panel.segment_max, panel.segment[lane]);
      panel.scattered |= !p.segment_ranges[b * p.seqlen_q + row].whole;
    }
  }
}

// The softmax before its first key.
template <class E>
inline void start_softmax(Panel<E>& panel) {
  using Scalar = typename E::Scalar;
  for (int lane = 0; lane < E::kLanes; ++lane) {
    panel.shift[lane] = 0;
    panel.limit[lane] = -static_cast<Scalar>(__builtin_inf());
    panel.sum[lane] = 0;
    panel.block_sum[lane] = 0;
  }
  if constexpr (E::kObserves) {
    panel.start(panel.live);
  }
}

// Fills lanes with rows [begin, begin + live) of the range's key/value head.
template <class E>
FASTATTN_NOINLINE void place_rows(Panel<E>& panel, const AttentionParams& p, const RowRange& range, int64_t begin) {
  const int64_t group = p.query_heads / p.kv_heads;
  const int64_t b = range.batch;
  panel.live = static_cast<int>(min64(E::kLanes, range.end - begin));
  const bool extras = p.mask != nullptr || p.bias != nullptr || p.alibi_slopes != nullptr || p.dropout.threshold > 0 ||
                      p.scattered_segments;
  const int64_t needed = E::kMethod == Method::rows ? panel.live : round_up(panel.live, E::kWidth);
  panel.placed = extras ? E::kLanes : static_cast<int>(needed);
  panel.first_min = panel.last_min = panel.segment_min = INT64_MAX;
  panel.first_max = panel.last_max = 0;
  panel.segment_max = INT64_MIN;
  panel.scattered = false;
  panel.dense = nullptr;
  panel.first_head = p.dropout.first_head + b * p.query_heads;
  panel.batch = b;
  panel.mask_shared = panel.bias_shared = true;
  int64_t head = range.kv_head * group + begin / p.seqlen_q;
  int64_t row = begin % p.seqlen_q;
  const int64_t last_key = max64(p.seqlen_k - 1, 0);
  for (int lane = 0; lane < panel.placed; ++lane) {
    if (lane > 0 && lane < panel.live && ++row == p.seqlen_q) {  // a division a lane was a tenth of a short call
      row = 0;
      ++head;
    }
    panel.head[lane] = head;
    panel.row[lane] = row;
    panel.position[lane] = row + p.query_offset[b];
    panel.nearest[lane] = clamp64(panel.position[lane], 0, last_key);
    const Interval seen = visible_interval(p, b, row);
    panel.first[lane] = seen.first;
    panel.last[lane] = seen.last;
    panel.first_min = min64(panel.first_min, seen.first);
    panel.first_max = max64(panel.first_max, seen.first);
    panel.last_min = min64(panel.last_min, seen.last);
    panel.last_max = max64(panel.last_max, seen.last);
  }
  for (int lane = 0; lane < E::kLanes; ++lane) {
    panel.slope[lane] = 0;
    panel.beyond[lane] = 0;
  }
  start_softmax<E>(panel);
  if (extras) {
    place_extras<E>(panel, p, b);
  }
}

// Interval and nearest key relative to the key block that starts at `block`; exact, since they are clipped to the
// block.
template <class E>
inline void enter_block(Panel<E>& panel, int64_t block) {
  using Scalar = typename E::Scalar;
  panel.block = block;
  for (int lane = 0; lane < panel.placed; ++lane) {
    panel.block_first[lane] = static_cast<Scalar>(clamp64(panel.first[lane] - block, 0, E::kBlockKeys));
    panel.block_last[lane] = static_cast<Scalar>(clamp64(panel.last[lane] - block, 0, E::kBlockKeys));
    panel.block_position[lane] = static_cast<Scalar>(panel.nearest[lane] - block);
    panel.block_sum[lane] = 0;
  }
  if constexpr (E::kObserves) {
    panel.enter_block(block);
  }
}

// Operands of a lane each from kWidth rows of queries, transposed: out[step][lane]. Rows are read by whole registers of
// lanes; `columns` is how many lanes of operands a row has.
template <class E, class Load>
FASTATTN_INLINE void transpose_rows(typename E::Scalar* out, int64_t columns, Load load) {
  using V = typename E::V;
  for (int64_t c = 0; c < columns; c += E::kWidth) {
    const int count = static_cast<int>(min64(E::kWidth, columns - c));
    typename V::Reg r[E::kWidth];
    for (int i = 0; i < E::kWidth; ++i) {
      r[i] = load(i, c, count);
    }
    V::transpose(r);
    for (int i = 0; i < count; ++i) {
      V::store(out + (c + i) * E::kLanes, r[i]);
    }
  }
}

template <class E>
FASTATTN_INLINE const typename E::Source* query_row(const Panel<E>& panel, const AttentionParams& p, int64_t batch,
                                                    int lane) {
  return at<typename E::Source>(p.query, batch * p.query_strides[0] + panel.head[lane] * p.query_strides[1] +
                                             panel.row[lane] * p.query_strides[2]);
}

// Lanes of a query row for Method::rows: whole vectors.
template <class E>
constexpr int64_t query_lanes(int64_t head_dim) {
  return (head_dim + E::Dot::kElements - 1) / E::Dot::kElements * E::kWidth;
}

// Lanes of operands that a query row takes; kDimMultiple pads with zeros.
template <class E>
constexpr int64_t query_row_lanes(const AttentionParams& p) {
  if constexpr (E::kMethod == Method::rows) {
    return query_lanes<E>(p.head_dim);
  } else {
    return round_up(p.head_dim, E::kDimMultiple) / E::kDepth;
  }
}

// Packs the panel's queries for rows dotted with rows: [lane][query_row_lanes].
template <class E>
FASTATTN_NOINLINE void copy_query(Panel<E>& panel, const AttentionParams& p, int64_t batch, double factor) {
  using Dot = typename E::Dot;
  const int64_t stride = query_row_lanes<E>(p);
  for (int lane = 0; lane < panel.live; ++lane) {
    const auto* row = query_row<E>(panel, p, batch, lane);
    auto* out = panel.query + lane * stride;
    if constexpr (Dot::kWords) {
      typename E::Source whole[kMaxHeadDim];
      row = p.query_strides[3] == 1 ? row : gather_row(row, p.query_strides[3], p.head_dim, whole);
      panel.query_scale[lane] = Dot::pack_query(row, p.head_dim, factor, out);
    } else {
      for (int64_t d = 0; d < p.head_dim; d += Dot::kElements, out += E::kWidth) {
        const int count = static_cast<int>(min64(Dot::kElements, p.head_dim - d));
        typename E::Source piece[Dot::kElements];
        const bool adjacent = p.query_strides[3] == 1;
        const auto* from =
            adjacent ? row + d : gather_row(row + d * p.query_strides[3], p.query_strides[3], count, piece);
        E::V::store(out, Dot::load_query(from, count, factor));
      }
    }
  }
}

// Packs the panel's queries. `factor` multiplies them (only its sign where the product does not scale the query).
template <class E>
FASTATTN_NOINLINE void pack_query(Panel<E>& panel, const AttentionParams& p, int64_t batch, double factor) {
  using Scalar = typename E::Scalar;
  using Source = typename E::Source;
  const int64_t columns = query_row_lanes<E>(p);
  const bool direct = p.query_strides[3] == 1 && p.head_dim % E::kDimMultiple == 0;
  for (int vector = 0; vector * E::kWidth < panel.live; ++vector) {
    const Source* rows[E::kWidth];
    for (int i = 0; i < E::kWidth; ++i) {
      rows[i] = query_row<E>(panel, p, batch, vector * E::kWidth + i);
    }
    Scalar* out = panel.query + vector * E::kWidth;
    if (direct) {
      transpose_rows<E>(out, columns, [&](int i, int64_t c, int count) FASTATTN_LAMBDA_INLINE {
        return E::Product::load_query(rows[i] + c * E::kDepth, count, factor);
      });
      continue;
    }
    // Padding, or a stride between elements: gather a row's piece first.
    transpose_rows<E>(out, columns, [&](int i, int64_t c, int count) FASTATTN_LAMBDA_INLINE {
      Source piece[E::kWidth * E::kDepth] = {};
      const int64_t elements = min64(int64_t{count} * E::kDepth, p.head_dim - c * E::kDepth);
      for (int64_t e = 0; e < elements; ++e) {
        piece[e] = rows[i][(c * E::kDepth + e) * p.query_strides[3]];
      }
      return E::Product::load_query(piece, count, factor);
    });
  }
}

}  // namespace
}  // namespace fastattn
