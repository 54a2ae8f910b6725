#include "bindings/insight_params.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// A tensor that is written row by row, or read as a plain array.
void* read_contiguous(const char* name, const py::object& from, int code, std::initializer_list<int64_t> sizes) {
  const auto rank = static_cast<int>(sizes.size());
  const TensorView view = read_tuple(name, from, rank);
  expect_code(name, view, code);
  expect_sizes(name, view, sizes);
  int64_t stride = 1;
  for (int axis = rank - 1; axis >= 0; --axis) {
    if (view.sizes[axis] > 1 && view.strides[axis] != stride) {
      fail(name, "must be contiguous");
    }
    stride *= view.sizes[axis];
  }
  return view.data;
}

}  // namespace

InsightParams make_insight_params(const InsightArguments& tensors, Derived& derived) {
  InsightParams insight{};
  insight.forward = make_params(tensors.forward, derived);
  const AttentionParams& p = insight.forward;
  if (!derived.query_starts.empty() || p.block_table != nullptr || p.key_scales != nullptr) {
    fail("query", "expected a call of one sequence a batch, without caches");
  }
  const int code = static_cast<int>(lse_dtype(p.dtype));
  insight.top_k = read_tuple("keys", tensors.keys, 4).sizes[3];
  if (insight.top_k < 1) {
    fail("keys", "expected room for a key at least");
  }
  const std::initializer_list<int64_t> top = {p.batch, p.query_heads, p.seqlen_q, insight.top_k};
  insight.keys = static_cast<int64_t*>(read_contiguous("keys", tensors.keys, kCodeInt64, top));
  insight.weights = read_contiguous("weights", tensors.weights, code, top);
  insight.entropy = read_contiguous("entropy", tensors.entropy, code, {p.batch, p.query_heads, p.seqlen_q});
  insight.key_mass = read_contiguous("key_mass", tensors.key_mass, code, {p.batch, p.query_heads, p.seqlen_k});
  if (tensors.edges.is_none() != tensors.distance_mass.is_none()) {
    fail("edges, distance_mass", "expected both or neither");
  }
  if (!tensors.edges.is_none()) {
    insight.edge_count = read_tuple("edges", tensors.edges, 1).sizes[0];
    insight.edges =
        static_cast<const int64_t*>(read_contiguous("edges", tensors.edges, kCodeInt64, {insight.edge_count}));
    insight.distance_mass =
        read_contiguous("distance_mass", tensors.distance_mass, code, {p.batch, p.query_heads, insight.edge_count + 1});
  }
  return insight;
}

}  // namespace fastattn
