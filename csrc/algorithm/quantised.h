// Few queries over quantised keys and values. Many have theirs dequantised as they are packed (operands.h).
#pragma once

#include "algorithm/forward.h"

namespace fastattn {
namespace {

// Few queries by the engine E; if that takes others than theirs, as float32: queries and their results are few.
template <class Source, class E>
void run_as(const AttentionParams& p) {
  if constexpr (kSame<Source, typename E::Source>) {
    run_forward<E>(p);
    return;
  }
  const int64_t rows = p.batch * p.query_heads * p.seqlen_q;
  const Workspace workspace(static_cast<size_t>(rows * (p.head_dim + p.value_dim)) * sizeof(float));
  auto* query = reinterpret_cast<float*>(workspace.data());
  float* out = query + rows * p.head_dim;
  AttentionParams wide = p;
  wide.dtype = DType::float32;
  wide.query = query;
  wide.out = out;
  const auto each_row = [&](const int64_t* strides, auto visit) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = row / p.seqlen_q;
      visit(row, head / p.query_heads * strides[0] + head % p.query_heads * strides[1] + row % p.seqlen_q * strides[2]);
    }
  };
  const auto pack = [&](int64_t (&strides)[4], int64_t columns) {
    strides[3] = 1;
    strides[2] = columns;
    strides[1] = columns * p.seqlen_q;
    strides[0] = strides[1] * p.query_heads;
  };
  pack(wide.query_strides, p.head_dim);
  pack(wide.out_strides, p.value_dim);
  each_row(p.query_strides, [&](int64_t row, int64_t index) {
    for (int64_t d = 0; d < p.head_dim; ++d) {
      query[row * p.head_dim + d] = to_scalar(*at<Source>(p.query, index + d * p.query_strides[3]));
    }
  });
  run_forward<E>(wide);
  each_row(p.out_strides, [&](int64_t row, int64_t index) {
    for (int64_t d = 0; d < p.value_dim; ++d) {
      from_scalar(out[row * p.value_dim + d], static_cast<Source*>(p.out) + index + d * p.out_strides[3]);
    }
  });
}

// Few queries over quantised keys and values, of one call, by the engines for what these are stored as.
template <class Source, class Int8Rows, class Float8Rows>
void quantised(const AttentionParams* call, int64_t /*count*/) {
  (call->kv_dtype == DType::int8 ? run_as<Source, Int8Rows> : run_as<Source, Float8Rows>)(*call);
}

}  // namespace
}  // namespace fastattn
