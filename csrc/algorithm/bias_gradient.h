// The gradient of the bias: dS once more, added up over the axes that the bias does not have.
//
// A pass of its own, which takes two products of the five again: heads that run at once would else write to one place.
// A task has some rows and keys of the bias to itself, and goes through the heads of a wave in order.
#pragma once

#include "algorithm/gradient_block.h"

namespace fastattn {
namespace {

// Rows of the bias are shared out panel by panel, keys block by block, where it has such axes, and where no row is in
// two panels by way of two heads.
template <class E>
inline int64_t bias_row_parts(const BackwardCall<E>& call) {
  return call.b.grad_bias_strides[2] != 0 && !call.plan.mixed ? call.plan.span_panels : 1;
}

template <class E>
inline int64_t bias_tasks(const BackwardCall<E>& call) {
  return bias_row_parts(call) * (call.b.grad_bias_strides[3] != 0 ? call.plan.blocks : 1);
}

// Adds dS of one tile of the block's one panel, [key][lane], lanes and keys in order; sums over an axis without a
// stride are taken here first.
template <class E>
inline void add_bias_grads(const GradientBlock<E>& g, int64_t block_key, const typename E::Scalar* grads) {
  using Scalar = typename E::Scalar;
  const int64_t keys = min64(E::kKeys, g.block_end - g.block - block_key);
  const int64_t* strides = g.head.call.b.grad_bias_strides;
  const Panel<E>& panel = g.panel(0);
  auto* out =
      static_cast<Scalar*>(g.head.call.b.grad_bias) + g.head.batch * strides[0] + (g.block + block_key) * strides[3];
  if (strides[2] == 0) {  // one row: the lanes of each head first
    for (int lane = 0; lane < panel.live;) {
      const int64_t query_head = panel.head[lane];
      int end = lane;
      while (end < panel.live && panel.head[end] == query_head) {
        ++end;
      }
      for (int64_t key = 0; key < keys; ++key) {
        double sum = 0;
        for (int i = lane; i < end; ++i) {
          sum += static_cast<double>(grads[key * E::kLanes + i]);
        }
        out[query_head * strides[1] + key * strides[3]] += static_cast<Scalar>(sum);
      }
      lane = end;
    }
    return;
  }
  for (int lane = 0; lane < panel.live; ++lane) {
    Scalar* row = out + panel.head[lane] * strides[1] + panel.row[lane] * strides[2];
    double sum = 0;
    for (int64_t key = 0; key < keys; ++key) {
      const Scalar grad = grads[key * E::kLanes + lane];
      if (strides[3] == 0) {
        sum += static_cast<double>(grad);
      } else {
        row[key * strides[3]] += grad;
      }
    }
    if (strides[3] == 0) {
      *row += static_cast<Scalar>(sum);
    }
  }
}

template <class E>
void run_bias_tile(void* opaque, int64_t index, int thread) {
  const auto& call = *static_cast<const BackwardCall<E>*>(opaque);
  const BackwardPlan<E>& plan = call.plan;
  const AttentionParams& p = call.b.forward;
  const typename E::V::FlushDenormals flush;
  const bool some_rows = bias_row_parts(call) > 1;
  const bool some_keys = call.b.grad_bias_strides[3] != 0;
  const int64_t row_part = index % bias_row_parts(call);
  const int64_t key_part = index / bias_row_parts(call);
  for (int64_t i = 0; i < call.head_count; ++i) {
    const BackwardHead<E> head = backward_head(call, i);
    for (int64_t span = 0; span < plan.spans; ++span) {
      for (int64_t part = some_rows ? row_part : 0; part < (some_rows ? row_part + 1 : plan.span_panels); ++part) {
        for (int64_t at = some_keys ? key_part : 0; at < (some_keys ? key_part + 1 : plan.blocks); ++at) {
          const int64_t block = at * E::kBlockKeys;
          GradientBlock<E> g = gradient_block<E>(head, call.threads + thread * plan.thread_bytes, 0,
                                                 span * plan.span_panels + part, 1, block, true);
          if (!enter_gradient_block<E>(g)) {
            continue;
          }
          GradientContext<E> context = gradient_context<E>(g, 0);
          for (int64_t key = 0; key < g.block_end - block; key += E::kKeys) {
            if (gradient_tiles<E>(g, context, 0, key)) {
              add_bias_grads<E>(g, key, g.grads(g.coefficients(0, key)));
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace fastattn
