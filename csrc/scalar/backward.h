// The scalar backward: obvious loops in double precision. Query rows first, twice over their keys, then keys.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "scalar/rows.h"
#include "workspace.h"

namespace fastattn {
namespace {

// What is known of a query row before its pairs.
struct RowState {
  double delta;  // <dO, O> - dlse
  double total;  // of exp(s - lse): 1, but for what lse has lost to its type
};

// One call, and of each query row what is known.
struct ScalarBackward {
  const BackwardParams& b;
  RowState* states;  // (B, Hq, Lq)

  RowState& state(const Row& r) const {
    return states[(r.batch * b.forward.query_heads + r.head) * b.forward.seqlen_q + r.row];
  }
};

inline double row_number(DType dtype, const void* tensor, const int64_t (&strides)[3], const Row& r) {
  const int64_t index = r.batch * strides[0] + r.head * strides[1] + r.row * strides[2];
  return dtype == DType::float64 ? load<double>(tensor, index) : load<float>(tensor, index);
}

inline void store_sum(DType dtype, void* tensor, int64_t index, double x) {
  if (dtype == DType::float64) {
    static_cast<double*>(tensor)[index] += x;
  } else {
    static_cast<float*>(tensor)[index] += static_cast<float>(x);
  }
}

// What one query and one key give each other.
struct Pair {
  double prob = 0;
  double weight = 0;   // prob as dropout leaves it
  double grad = 0;     // of the score as the softmax sees it
  double product = 0;  // of scale * <q, k>, before softcap
};

template <class T>
Pair make_pair(ScalarBackward& call, const Row& r, int64_t key) {
  const BackwardParams& b = call.b;
  const AttentionParams& p = b.forward;
  const double lse = row_number(p.dtype, p.lse, p.lse_strides, r);
  if (lse == -kInfinity || !visible<T>(p, r, key)) {
    return {};
  }
  Pair pair;
  pair.prob = std::exp(score<T>(p, r, key) - lse) / call.state(r).total;
  double grad = b.grad_weights == nullptr ? 0 : load<T>(b.grad_weights, offset(b.grad_weights_strides, r, key));
  const int64_t v = r.batch * p.value_strides[0] + r.kv_head * p.value_strides[1] + key * p.value_strides[2];
  for (int64_t d = 0; d < p.value_dim; ++d) {
    grad += load<T>(b.grad_out, offset(b.grad_out_strides, r, d)) * load<T>(p.value, v + d * p.value_strides[3]);
  }
  const double factor = kept(p, r, key);
  pair.weight = pair.prob * factor;
  pair.grad = pair.prob * (grad * factor - call.state(r).delta);
  pair.product = pair.grad;
  if (p.softcap > 0) {
    const double ratio = std::tanh(product<T>(p, r, key) / p.softcap);
    pair.product *= 1 - ratio * ratio;
  }
  return pair;
}

// Of a sink, which a log-sum-exp that was rounded to its type may lie far below: large then, but a number.
inline double sink_probability(double sink, double lse) { return std::exp(std::min(sink - lse, 700.0)); }

template <class T>
void find_state(ScalarBackward& call, const Row& r) {
  const BackwardParams& b = call.b;
  const AttentionParams& p = b.forward;
  const double lse = row_number(p.dtype, p.lse, p.lse_strides, r);
  double total = p.sinks == nullptr ? 0 : sink_probability(p.sinks[r.head], lse);
  bool sees = false;
  for (int64_t key = 0; key < p.seqlen_k; ++key) {
    if (visible<T>(p, r, key)) {
      sees = true;
      total += std::exp(score<T>(p, r, key) - lse);
    }
  }
  // What rounding does not account for says that the keys are a part of those that lse is of.
  const bool wide = p.dtype == DType::float64;
  const bool counts =
      std::isfinite(lse) && std::fabs(std::log(total)) <= 4 * (wide ? 0x1p-52 : 0x1p-23) * std::fabs(lse);
  if (p.sinks != nullptr && !sees) {  // it may have seen others of them
    const double sink = p.sinks[r.head];
    sees = lse != (wide ? sink : static_cast<double>(static_cast<float>(sink)));
  }
  double delta = b.grad_lse == nullptr ? 0 : -row_number(p.dtype, b.grad_lse, b.grad_lse_strides, r);
  for (int64_t d = 0; sees && d < p.value_dim; ++d) {  // what nothing was seen for is of no account, even if NaN
    delta += load<T>(b.grad_out, offset(b.grad_out_strides, r, d)) * load<T>(p.out, offset(p.out_strides, r, d));
  }
  call.state(r) = {delta, counts ? total : 1};
}

// dQ, and what is summed over the rows of a head.
template <class T>
void run_query_head(void* context, int64_t index, int /*thread*/) {
  auto& call = *static_cast<ScalarBackward*>(context);
  const BackwardParams& b = call.b;
  const AttentionParams& p = b.forward;
  double slope = 0;
  double sink = 0;
  for (int64_t row = 0; row < p.seqlen_q; ++row) {
    const Row r = row_at(p, index * p.seqlen_q + row);
    find_state<T>(call, r);
    double sums[kMaxHeadDim] = {};
    for (int64_t key = 0; key < p.seqlen_k; ++key) {
      const Pair pair = make_pair<T>(call, r, key);
      if (pair.prob == 0) {
        continue;  // what is hidden, or underflows, must not meet a NaN
      }
      const int64_t k = r.batch * p.key_strides[0] + r.kv_head * p.key_strides[1] + key * p.key_strides[2];
      for (int64_t d = 0; d < p.head_dim; ++d) {
        sums[d] += pair.product * load<T>(p.key, k + d * p.key_strides[3]);
      }
      if (b.grad_bias != nullptr) {
        store_sum(p.dtype, b.grad_bias, offset(b.grad_bias_strides, r, key), pair.grad);
      }
      slope -= pair.grad * std::fabs(static_cast<double>(r.position - key));
    }
    for (int64_t d = 0; b.grad_query != nullptr && d < p.head_dim; ++d) {
      store<T>(b.grad_query, offset(b.grad_query_strides, r, d), sums[d] * p.scale);
    }
    const double lse = row_number(p.dtype, p.lse, p.lse_strides, r);
    if (p.sinks != nullptr && lse != -kInfinity) {
      sink -= sink_probability(p.sinks[r.head], lse) / call.state(r).total * call.state(r).delta;
    }
  }
  if (b.grad_slopes != nullptr) {
    b.grad_slopes[index] = slope;
  }
  if (b.grad_sinks != nullptr) {
    b.grad_sinks[index] = sink;
  }
}

// dK and dV of one key.
template <class T>
void run_key(void* context, int64_t index, int /*thread*/) {
  auto& call = *static_cast<ScalarBackward*>(context);
  const BackwardParams& b = call.b;
  const AttentionParams& p = b.forward;
  const int64_t key = index % p.seqlen_k;
  const int64_t kv_head = index / p.seqlen_k % p.kv_heads;
  const int64_t batch = index / p.seqlen_k / p.kv_heads;
  const int64_t group = p.query_heads / p.kv_heads;
  double key_sums[kMaxHeadDim] = {};
  double value_sums[kMaxValueDim] = {};
  for (int64_t i = 0; i < group * p.seqlen_q; ++i) {
    const Row r = row_at(p, (batch * p.query_heads + kv_head * group) * p.seqlen_q + i);
    const Pair pair = make_pair<T>(call, r, key);
    if (pair.prob == 0) {
      continue;
    }
    for (int64_t d = 0; d < p.head_dim; ++d) {
      key_sums[d] += pair.product * load<T>(p.query, offset(p.query_strides, r, d));
    }
    for (int64_t d = 0; d < p.value_dim; ++d) {
      value_sums[d] += pair.weight * load<T>(b.grad_out, offset(b.grad_out_strides, r, d));
    }
  }
  const auto write = [&](void* tensor, const int64_t (&strides)[4], const double* sums, int64_t columns, double scale) {
    for (int64_t d = 0; tensor != nullptr && d < columns; ++d) {
      store<T>(tensor, batch * strides[0] + kv_head * strides[1] + key * strides[2] + d * strides[3], sums[d] * scale);
    }
  };
  write(b.grad_key, b.grad_key_strides, key_sums, p.head_dim, p.scale);
  write(b.grad_value, b.grad_value_strides, value_sums, p.value_dim, 1);
}

template <class T>
void run_backward(const BackwardParams& b) {
  const AttentionParams& p = b.forward;
  const Workspace workspace(sizeof(RowState) * static_cast<size_t>(p.batch * p.query_heads * p.seqlen_q));
  ScalarBackward call{b, reinterpret_cast<RowState*>(workspace.data())};
  // Heads may add to one bias: they take turns.
  parallel_for(p.batch * p.query_heads, b.grad_bias != nullptr ? 1 : p.num_threads, run_query_head<T>, &call);
  if (b.grad_key != nullptr || b.grad_value != nullptr) {
    parallel_for(p.batch * p.kv_heads * p.seqlen_k, p.num_threads, run_key<T>, &call);
  }
}

template <class T>
void backward(const BackwardParams* calls, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    run_backward<T>(calls[i]);
  }
}

}  // namespace
}  // namespace fastattn
