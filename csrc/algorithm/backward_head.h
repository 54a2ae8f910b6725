// One key/value head of the backward: where its operands lie, and what is made ready before the first product.
#pragma once

#include "algorithm/backward_plan.h"
#include "algorithm/block.h"
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
  char* threads;  // [threads][thread_bytes]
  char* heads;    // [wave][head_bytes]; [threads][room_bytes] where threads go through whole heads
  int64_t room_bytes;
  int64_t first_head;  // of the wave, counted over batch and key/value heads
  int64_t head_count;  // of the wave
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

  // A lane's number of a tensor of lse's type.
  double row_number(const Panel<E>& panel, int lane, const void* tensor, const int64_t* strides) const {
    const int64_t index = batch * strides[0] + panel.head[lane] * strides[1] + panel.row[lane] * strides[2];
    return p().dtype == DType::float64 ? *at<double>(tensor, index) : static_cast<double>(*at<float>(tensor, index));
  }

  double lse(const Panel<E>& panel, int lane) const { return row_number(panel, lane, p().lse, p().lse_strides); }

  // Steps of a span from `row` on, the first of a panel, where they lie or packed.
  RowBase steps(bool packed, int64_t packed_at, int64_t columns, const void* tensor, const int64_t* strides,
                int64_t span, int64_t row) const {
    constexpr auto kScalar = static_cast<int64_t>(sizeof(Scalar));
    if (packed) {
      const int64_t step = (span * plan().span_panels * E::kLanes + row) / E::kDepth;
      return {scratch + packed_at + step * columns * kScalar, columns * kScalar};
    }
    const int64_t head = kv_head * (p().query_heads / p().kv_heads) + span;
    const auto* first = at<Source>(tensor, batch * strides[0] + head * strides[1] + row * strides[2]);
    return {reinterpret_cast<const char*>(first), strides[2] * kScalar};
  }
  RowBase query_steps(int64_t span, int64_t row) const {
    return steps(plan().pack_query, plan().query_rows_at, plan().head_dim, p().query, p().query_strides, span, row);
  }
  RowBase grad_out_steps(int64_t span, int64_t row) const {
    return steps(plan().pack_grad_out, plan().grad_out_rows_at, plan().value_dim, call.b.grad_out,
                 call.b.grad_out_strides, span, row);
  }

  // Rows of keys and values from `key` on.
  RowBase keys(bool packed, int64_t packed_at, int64_t lanes, const void* first, int64_t stride, int64_t key) const {
    const auto bytes = static_cast<int64_t>(packed ? lanes * sizeof(Scalar) : stride * sizeof(typename E::Element));
    return {(packed ? scratch + packed_at : static_cast<const char*>(first)) + key * bytes, bytes};
  }
  RowBase key_rows(int64_t key) const {
    return keys(plan().pack_key, plan().key_rows_at, plan().key_lanes, key_row<E>(p(), batch, kv_head, 0),
                p().key_strides[2], key);
  }
  RowBase value_rows(int64_t key) const {
    return keys(plan().pack_value, plan().value_rows_at, plan().value_lanes, value_row<E>(p(), batch, kv_head, 0),
                p().value_strides[2], key);
  }
  RowBase key_steps(int64_t key) const {
    return plan().pack_steps ? keys(true, plan().key_steps_at, plan().head_dim, nullptr, 0, key / E::kDepth)
                             : key_rows(key);
  }
};

template <class E>
inline BackwardHead<E> backward_head(const BackwardCall<E>& call, int64_t index) {
  const int64_t head = call.first_head + index;
  const AttentionParams& p = call.b.forward;
  return {call, head / p.kv_heads, head % p.kv_heads, call.heads + index * call.plan.head_bytes};
}

// A row of `count` numbers as operand elements, padded with zeros to a number of vectors; all zeros for a null row.
template <class E>
inline void pack_row(const typename E::Source* row, int64_t stride, int64_t count, typename E::Element* out,
                     int64_t padded) {
  using Element = typename E::Element;
  const int64_t there = row == nullptr ? 0 : count;
  int64_t d = 0;
  if constexpr (E::kDepth == 1) {
    using V = typename E::V;
    for (; stride == 1 && d + E::kWidth <= there; d += E::kWidth) {
      V::store(out + d, V::load(row + d));
    }
  }
  for (; d < there; ++d) {
    if constexpr (E::kConvert) {
      out[d] = to_scalar(row[d * stride]);
    } else {
      out[d] = row[d * stride];
    }
  }
  memset(static_cast<void*>(out + there), 0, sizeof(Element) * static_cast<size_t>(padded - there));
}

// A step of the second products: `depth` rows, of which null ones are zeros. Their elements pair up in lanes.
template <class E>
inline void pack_step(const typename E::Source* const (&rows)[E::kDepth], int64_t stride, int64_t count,
                      typename E::Scalar* out, int64_t padded) {
  if constexpr (E::kDepth == 1) {
    pack_row<E>(rows[0], stride, count, out, padded);
  } else {
    using V = typename E::V;
    using Source = typename E::Source;
    constexpr int64_t kLongest = kMaxHeadDim > kMaxValueDim ? kMaxHeadDim : kMaxValueDim;
    static const Source kZeros[kLongest] = {};
    Source gathered[2][kLongest];
    const Source* from[2];
    for (int i = 0; i < 2; ++i) {
      from[i] = rows[i] == nullptr ? kZeros : stride == 1 ? rows[i] : gather_row(rows[i], stride, count, gathered[i]);
    }
    for (int64_t d = 0; d < padded; d += E::kWidth) {
      V::store(out + d, V::interleave(from[0] + d, from[1] + d, static_cast<int>(min64(E::kWidth, count - d))));
    }
  }
}

// The inner product of two rows.
template <class E>
inline double dot(const typename E::Source* a, int64_t a_stride, const typename E::Source* b, int64_t b_stride,
                  int64_t count) {
  using V = typename E::V;
  double total = 0;
  int64_t d = 0;
  if (a_stride == 1 && b_stride == 1) {
    auto sum = V::zero();
    for (; d + E::kWidth <= count; d += E::kWidth) {
      sum = V::fma(V::load(a + d), V::load(b + d), sum);
    }
    total = lane_sum<E>(sum);
  }
  for (; d < count; ++d) {
    total += static_cast<double>(to_scalar(a[d * a_stride])) * static_cast<double>(to_scalar(b[d * b_stride]));
  }
  return total;
}

// Whether a row has seen nothing but its sink: its dO is then of no account, even if it is not finite.
template <class E>
inline bool saw_sink_alone(const AttentionParams& p, int64_t query_head, double lse, const typename E::Source* out) {
  if (p.sinks == nullptr || lse != static_cast<double>(static_cast<typename E::Scalar>(p.sinks[query_head]))) {
    return false;
  }
  int64_t d = 0;
  while (d < p.value_dim && to_scalar(out[d * p.out_strides[3]]) == 0) {
    ++d;
  }
  return d == p.value_dim;
}

// The reference point of each lane: its normaliser, and the mean that its gradients are taken from.
template <class E>
inline void place_levels(const BackwardHead<E>& head, const Panel<E>& panel, int64_t i) {
  using Scalar = typename E::Scalar;
  using Source = typename E::Source;
  const BackwardParams& b = head.call.b;
  const AttentionParams& p = b.forward;
  auto* level = head.scalars(head.plan().level_at) + i * E::kLanes;
  auto* excess = head.scalars(head.plan().excess_at) + i * E::kLanes;
  auto* delta = head.scalars(head.plan().delta_at) + i * E::kLanes;
  for (int lane = 0; lane < E::kLanes; ++lane) {
    level[lane] = static_cast<Scalar>(__builtin_inf());  // P = 0 where there is no row, or nothing to attend to
    excess[lane] = delta[lane] = 0;
    if (lane >= panel.live) {
      continue;
    }
    const double lse = head.lse(panel, lane);
    if (lse == -__builtin_inf()) {
      continue;
    }
    const int64_t row = head.batch * b.grad_out_strides[0] + panel.head[lane] * b.grad_out_strides[1] +
                        panel.row[lane] * b.grad_out_strides[2];
    const auto* out = at<Source>(p.out, head.batch * p.out_strides[0] + panel.head[lane] * p.out_strides[1] +
                                            panel.row[lane] * p.out_strides[2]);
    const auto* grad = at<Source>(b.grad_out, row);
    double sum = dot<E>(grad, b.grad_out_strides[3], out, p.out_strides[3], p.value_dim);
    if (sum != sum && saw_sink_alone<E>(p, panel.head[lane], lse, out)) {
      sum = 0;
    }
    sum -= b.grad_lse != nullptr ? head.row_number(panel, lane, b.grad_lse, b.grad_lse_strides) : 0;
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
  place_levels<E>(head, panel, i);
  if (panel.first_min >= panel.last_max) {  // no row of it sees a key
    return;
  }
  panel.query = head.scalars(plan.grad_out_at) + i * E::kLanes * plan.value_steps;
  pack_query<E>(panel, grads, head.batch, 1.0);
  panel.query = head.scalars(plan.query_at) + i * E::kLanes * plan.rules.steps;
  pack_query<E>(panel, p, head.batch, plan.query_factor);
  const auto pack = [&](bool packs, int64_t steps_at, const AttentionParams& from, const bool* bad, int64_t columns) {
    auto* out = head.scalars(steps_at) + i * kKeyLanes<E> * columns;
    for (int lane = 0; packs && lane < panel.live; lane += E::kDepth, out += columns) {
      const typename E::Source* rows[E::kDepth] = {};
      for (int k = 0; k < E::kDepth && lane + k < panel.live; ++k) {
        const int64_t flat = (head.batch * p.query_heads + panel.head[lane + k]) * p.seqlen_q + panel.row[lane + k];
        rows[k] = bad != nullptr && bad[flat] ? nullptr : query_row<E>(panel, from, head.batch, lane + k);
      }
      pack_step<E>(rows, from.query_strides[3], from.head_dim, out, columns);
    }
  };
  pack(plan.pack_query, plan.query_rows_at, p, call.bad.query, plan.head_dim);
  pack(plan.pack_grad_out, plan.grad_out_rows_at, grads, call.bad.grad_out, plan.value_dim);
}

// Packs one block of keys and values of one head.
template <class E>
void prepare_keys(void* opaque, int64_t index, int /*thread*/) {
  using Element = typename E::Element;
  const auto& call = *static_cast<const BackwardCall<E>*>(opaque);
  const BackwardPlan<E>& plan = call.plan;
  const BackwardHead<E> head = backward_head(call, index / plan.blocks);
  const AttentionParams& p = head.p();
  const int64_t begin = index % plan.blocks * E::kBlockKeys;
  const int64_t end = min64(begin + E::kBlockKeys, round_up(p.seqlen_k, E::kKeys));
  const Interval seen = sequence_interval(p, head.batch);
  if (begin >= seen.last || end <= seen.first) {
    return;
  }
  const bool* bad =
      call.bad.key == nullptr ? nullptr : call.bad.key + (head.batch * p.kv_heads + head.kv_head) * p.seqlen_k;
  const auto pack = [&](bool packs, int64_t rows_at, const auto& row_of, int64_t stride, int64_t count, int64_t lanes) {
    for (int64_t key = begin; packs && key < end; ++key) {
      pack_row<E>(key < p.seqlen_k ? row_of(p, head.batch, head.kv_head, key) : nullptr, stride, count,
                  reinterpret_cast<Element*>(head.scalars(rows_at) + key * lanes), lanes * E::kDepth);
    }
  };
  pack(plan.pack_key, plan.key_rows_at, key_row<E>, p.key_strides[3], p.head_dim, plan.key_lanes);
  pack(plan.pack_value, plan.value_rows_at, value_row<E>, p.value_strides[3], p.value_dim, plan.value_lanes);
  for (int64_t key = begin; plan.pack_steps && key < end; key += E::kDepth) {
    const typename E::Source* rows[E::kDepth] = {};
    for (int k = 0; k < E::kDepth; ++k) {
      const bool there = key + k < p.seqlen_k && !(plan.clean_key && bad[key + k]);
      rows[k] = there ? key_row<E>(p, head.batch, head.kv_head, key + k) : nullptr;
    }
    pack_step<E>(rows, p.key_strides[3], p.head_dim, head.scalars(plan.key_steps_at) + key / E::kDepth * plan.head_dim,
                 plan.head_dim);
  }
}

}  // namespace
}  // namespace fastattn
