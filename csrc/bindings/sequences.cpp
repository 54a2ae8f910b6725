#include "bindings/sequences.h"

#include <algorithm>

namespace fastattn {
namespace {

// Rows that share a task's keys, about: beyond them a longer sequence has more tasks, not longer ones.
constexpr int64_t kTaskRows = 128;

template <class T>
void advance(T*& tensor, int64_t elements, int64_t size) {
  if (tensor != nullptr) {
    tensor = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(tensor) + static_cast<uintptr_t>(elements * size));
  }
}

int64_t task_work(const AttentionParams& p) {
  return std::min(p.query_heads / p.kv_heads * p.seqlen_q, kTaskRows) * p.seqlen_k;
}

int64_t task_work(const BackwardParams& b) { return task_work(b.forward); }

AttentionParams one_sequence(const AttentionParams& whole, const Starts& queries, const Starts& keys, size_t s) {
  AttentionParams p = whole;
  const int64_t size = size_of(p.dtype);
  p.seqlen_q = queries[s + 1] - queries[s];
  p.seqlen_k = keys[s + 1] - keys[s];
  advance(p.query, queries[s] * p.query_strides[2], size);
  advance(p.out, queries[s] * p.out_strides[2], size);
  advance(p.lse, queries[s] * p.lse_strides[2], size_of(lse_dtype(p.dtype)));
  advance(p.key, keys[s] * p.key_strides[2], size);
  advance(p.value, keys[s] * p.value_strides[2], size);
  const auto index = static_cast<int64_t>(s);
  p.query_offset += index;
  advance(p.alibi_slopes, index * p.alibi_strides[0], 8);
  p.dropout.first_head = index * p.query_heads;
  return p;
}

BackwardParams one_sequence(const BackwardParams& whole, const Starts& queries, const Starts& keys, size_t s) {
  BackwardParams b = whole;
  b.forward = one_sequence(whole.forward, queries, keys, s);
  const AttentionParams& p = b.forward;
  const int64_t size = size_of(p.dtype);
  advance(b.grad_out, queries[s] * b.grad_out_strides[2], size);
  advance(b.grad_lse, queries[s] * b.grad_lse_strides[2], size_of(lse_dtype(p.dtype)));
  advance(b.grad_query, queries[s] * b.grad_query_strides[2], size);
  advance(b.grad_key, keys[s] * b.grad_key_strides[2], size);
  advance(b.grad_value, keys[s] * b.grad_value_strides[2], size);
  const auto heads = static_cast<int64_t>(s) * p.query_heads;
  advance(b.grad_slopes, heads, 8);
  advance(b.grad_sinks, heads, 8);
  return b;
}

template <class Params>
std::vector<Params> split(const Params& whole, const Starts& queries, const Starts& keys, bool without_queries) {
  std::vector<Params> calls;
  calls.reserve(queries.size());
  for (size_t s = 0; s + 1 < queries.size(); ++s) {
    if (without_queries || queries[s + 1] > queries[s]) {
      calls.push_back(one_sequence(whole, queries, keys, s));
    }
  }
  std::stable_sort(calls.begin(), calls.end(),
                   [](const Params& a, const Params& b) { return task_work(a) > task_work(b); });
  return calls;
}

}  // namespace

std::vector<AttentionParams> split_forward(const AttentionParams& whole, const Starts& queries, const Starts& keys) {
  return split(whole, queries, keys, false);
}

std::vector<BackwardParams> split_backward(const BackwardParams& whole, const Starts& queries, const Starts& keys) {
  return split(whole, queries, keys, true);
}

}  // namespace fastattn
