// Registers the extension's functions; nothing is computed here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/cache_call.h"
#include "bindings/cache_params.h"
#include "bindings/gil.h"
#include "bindings/insight_params.h"
#include "bindings/make_params.h"
#include "bindings/plain_call.h"
#include "bindings/torch_tensors.h"
#include "cpu_features.h"
#include "dispatch.h"
#include "parallel.h"
#include "peak.h"
#include "workspace.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace fastattn {
namespace {

// Distances past this are the same as none; it keeps sums of positions within 64 bits.
int64_t window_bound(int64_t distance) { return distance < 0 || distance > kUnbounded ? kUnbounded : distance; }

Dropout make_dropout(double p, uint64_t seed, uint32_t offset) {
  Dropout dropout{};
  dropout.threshold = static_cast<uint64_t>(std::ceil(p * 0x1p32));
  dropout.scale = p < 1 ? 1 / (1 - p) : 0;
  dropout.seed = seed;
  dropout.offset = offset;
  return dropout;
}

void set_rules(AttentionParams& p, double scale, double softcap, const Dropout& dropout, int64_t window_left,
               int64_t window_right, int num_threads) {
  p.dropout = dropout;
  p.scale = scale;
  p.softcap = softcap;
  p.window_left = window_bound(window_left);
  p.window_right = window_bound(window_right);
  p.num_threads = num_threads < 1 ? 1 : num_threads;
}

void require_out(const py::object& out) {
  if (out.is_none()) {
    fail("out", "expected a tensor");
  }
}

void attention_forward(const py::object& query, const py::object& key, const py::object& value, const py::object& out,
                       const py::object& lse, const py::object& weights, const py::object& mask, const py::object& bias,
                       const py::object& kv_lengths, const py::object& query_offset, const py::object& alibi_slopes,
                       const py::object& sinks, double scale, double softcap, double dropout_p, uint64_t dropout_seed,
                       uint32_t dropout_offset, int64_t window_left, int64_t window_right, int num_threads,
                       const py::object& kv_starts, const py::object& query_lengths, const py::object& query_segments,
                       const py::object& key_segments, const py::object& block_table, const py::object& key_scales,
                       const py::object& value_scales, const py::object& cu_seqlens_q, const py::object& cu_seqlens_k) {
  Derived derived;
  require_out(out);
  AttentionParams p =
      make_params({query,          key,          value,        out,          lse,          weights,      mask,
                   bias,           kv_lengths,   query_offset, alibi_slopes, sinks,        kv_starts,    query_lengths,
                   query_segments, key_segments, block_table,  key_scales,   value_scales, cu_seqlens_q, cu_seqlens_k},
                  derived);
  set_rules(p, scale, softcap, make_dropout(dropout_p, dropout_seed, dropout_offset), window_left, window_right,
            num_threads);
  const ForwardFn run = forward_kernel(p);
  if (derived.query_starts.empty()) {
    without_gil([&] { run(&p, 1); });
    return;
  }
  const std::vector<AttentionParams> calls = split_forward(p, derived.query_starts, derived.key_starts);
  without_gil([&] { run(calls.data(), static_cast<int64_t>(calls.size())); });
}

void attention_backward(const py::object& query, const py::object& key, const py::object& value, const py::object& out,
                        const py::object& lse, const py::object& mask, const py::object& bias,
                        const py::object& kv_lengths, const py::object& query_offset, const py::object& alibi_slopes,
                        const py::object& sinks, const py::object& grad_out, const py::object& grad_lse,
                        const py::object& grad_weights, const py::object& grad_query, const py::object& grad_key,
                        const py::object& grad_value, const py::object& grad_bias, const py::object& grad_slopes,
                        const py::object& grad_sinks, double scale, double softcap, double dropout_p,
                        uint64_t dropout_seed, uint32_t dropout_offset, int64_t window_left, int64_t window_right,
                        int num_threads, const py::object& kv_starts, const py::object& query_lengths,
                        const py::object& query_segments, const py::object& key_segments,
                        const py::object& cu_seqlens_q, const py::object& cu_seqlens_k) {
  Derived derived;
  require_out(out);
  BackwardParams b = make_backward_params(
      {{query,          key,          value,        out,          lse,        py::none(),   mask,
        bias,           kv_lengths,   query_offset, alibi_slopes, sinks,      kv_starts,    query_lengths,
        query_segments, key_segments, py::none(),   py::none(),   py::none(), cu_seqlens_q, cu_seqlens_k},
       grad_out,
       grad_lse,
       grad_weights,
       grad_query,
       grad_key,
       grad_value,
       grad_bias,
       grad_slopes,
       grad_sinks},
      derived);
  set_rules(b.forward, scale, softcap, make_dropout(dropout_p, dropout_seed, dropout_offset), window_left, window_right,
            num_threads);
  const BackwardFn run = kernels().backward[static_cast<int>(b.forward.dtype)];
  if (derived.query_starts.empty()) {
    without_gil([&] { run(&b, 1); });
    return;
  }
  const std::vector<BackwardParams> calls = split_backward(b, derived.query_starts, derived.key_starts);
  without_gil([&] { run(calls.data(), static_cast<int64_t>(calls.size())); });
}

void attention_insight(const py::object& query, const py::object& key, const py::object& value, const py::object& out,
                       const py::object& keys, const py::object& weights, const py::object& entropy,
                       const py::object& key_mass, const py::object& edges, const py::object& distance_mass,
                       const py::object& mask, const py::object& bias, const py::object& kv_lengths,
                       const py::object& query_offset, const py::object& alibi_slopes, const py::object& sinks,
                       double scale, double softcap, int64_t window_left, int64_t window_right, int num_threads,
                       const py::object& kv_starts, const py::object& query_lengths, const py::object& query_segments,
                       const py::object& key_segments) {
  Derived derived;
  InsightParams p =
      make_insight_params({{query, key, value, out, py::none(), py::none(), mask, bias, kv_lengths, query_offset,
                            alibi_slopes, sinks, kv_starts, query_lengths, query_segments, key_segments},
                           keys,
                           weights,
                           entropy,
                           key_mass,
                           edges,
                           distance_mass},
                          derived);
  set_rules(p.forward, scale, softcap, Dropout{}, window_left, window_right, num_threads);
  const InsightFn run = kernels().insight[static_cast<int>(p.forward.dtype)];
  without_gil([&] { run(p); });
}

// `tensors`: those of CacheViews, or None.
void update(const py::tuple& tensors, int64_t capacity, int64_t query_step, bool interleaved, int num_threads) {
  CacheViews views;
  views.capacity = capacity;
  views.query_step = query_step;
  views.interleaved = interleaved;
  read_cache_views(tensors, views);
  Pages pages;
  CacheUpdateParams p = make_cache_update(views, pages);
  p.num_threads = num_threads < 1 ? 1 : num_threads;
  without_gil([&] { update_caches(p); });
}

py::object cached(py::handle query, py::handle key_cache, py::handle value_cache, py::handle key_scale,
                  py::handle value_scale, py::handle new_key, py::handle new_value, py::handle cache_seqlens,
                  py::handle block_table, py::handle rotary_cos, py::handle rotary_sin, bool rotary_interleaved,
                  bool causal, py::handle window, bool rolling, py::handle alibi_slopes, py::handle sinks,
                  py::handle softcap, py::handle scale, bool bshd, bool return_lse, int num_threads) {
  return attention_cached(
      {query,         key_cache,   value_cache,        key_scale,  value_scale, new_key,      new_value,
       cache_seqlens, block_table, rotary_cos,         rotary_sin, window,      alibi_slopes, sinks,
       softcap,       scale,       rotary_interleaved, causal,     rolling,     bshd,         return_lse},
      num_threads);
}

// `wanted`: whether the gradients of query, key and value are, a tuple that may go on.
py::object plain_backward(py::handle grad_out, py::handle grad_lse, py::handle query, py::handle key, py::handle value,
                          py::handle out, py::handle lse, const py::tuple& wanted, bool causal, py::handle scale,
                          bool bshd, int num_threads) {
  if (wanted.size() < 3) {
    throw std::invalid_argument("wanted: expected a flag for each of query, key and value");
  }
  const auto is_wanted = [&wanted](int i) { return PyTuple_GET_ITEM(wanted.ptr(), i) == Py_True; };
  const PlainGradients gradients{out, lse, grad_out, grad_lse, is_wanted(0), is_wanted(1), is_wanted(2)};
  return attention_plain_backward(gradients, query, key, value, causal, scale, bshd, num_threads);
}

std::string describe_path(int dtype, int64_t seqlen_q) {
  if (dtype < 0 || dtype >= kDTypes) {
    throw std::invalid_argument("dtype code " + std::to_string(dtype) + " is not a floating-point type");
  }
  const ForwardEntry& entry = kernels().forward[dtype];
  return std::string(entry.isa) + ": " + (seqlen_q <= few_queries(static_cast<DType>(dtype)) ? entry.few : entry.path);
}

py::dict features() {
  const CpuFeatures& cpu = cpu_features();
  py::dict names;
  names["avx2"] = cpu.avx2;
  names["avx512"] = cpu.avx512;
  names["avx512_bf16"] = cpu.avx512_bf16;
  names["avx512_vnni"] = cpu.avx512_vnni;
  names["amx_bf16"] = cpu.amx_bf16;
  names["amx_fp16"] = cpu.amx_fp16;
  names["fast_bf16_dot"] = cpu.fast_bf16_dot;
  return names;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTATTN_VERSION;
  info["compiler"] = FASTATTN_COMPILER;
  info["build_type"] = FASTATTN_BUILD_TYPE;
  return info;
}

py::dict openmp_info() {
  py::dict info;
  info["version"] = std::to_string(openmp_version());
  return info;
}

double peak(const std::string& kind, int num_threads, double seconds) {
  double rate = 0;
  without_gil([&] { rate = measure_peak(kind, num_threads, seconds); });
  return rate;
}

double read_time(uintptr_t address, int64_t bytes, int num_threads) {
  double seconds = 0;
  without_gil([&] { seconds = read_once(reinterpret_cast<const void*>(address), bytes, num_threads); });
  return seconds;
}

py::dict scratch() {
  const ScratchInfo s = scratch_info();
  py::dict info;
  info["pooled_bytes"] = s.pooled_bytes;
  info["pool_limit"] = s.pool_limit;
  info["packed_budget"] = s.packed_budget;
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  watch_forks();
  watch_main_thread();
  guard_scratch_pool();
  m.doc() = "Attention kernels for the CPU, chosen at run time for the machine they run on.";
  m.attr("__version__") = FASTATTN_VERSION;
  m.attr("UNBOUNDED") = kUnbounded;
  m.attr("DTYPE_CODES") = dtype_codes();
  m.def("attention_forward", attention_forward, "query"_a, "key"_a, "value"_a, "out"_a, "lse"_a, "weights"_a, "mask"_a,
        "bias"_a, "kv_lengths"_a, "query_offset"_a, "alibi_slopes"_a, "sinks"_a, "scale"_a, "softcap"_a, "dropout_p"_a,
        "dropout_seed"_a, "dropout_offset"_a, "window_left"_a, "window_right"_a, "num_threads"_a,
        "kv_starts"_a = py::none(), "query_lengths"_a = py::none(), "query_segments"_a = py::none(),
        "key_segments"_a = py::none(), "block_table"_a = py::none(), "key_scales"_a = py::none(),
        "value_scales"_a = py::none(), "cu_seqlens_q"_a = py::none(), "cu_seqlens_k"_a = py::none());
  m.def("attention_backward", attention_backward, "query"_a, "key"_a, "value"_a, "out"_a, "lse"_a, "mask"_a, "bias"_a,
        "kv_lengths"_a, "query_offset"_a, "alibi_slopes"_a, "sinks"_a, "grad_out"_a, "grad_lse"_a, "grad_weights"_a,
        "grad_query"_a, "grad_key"_a, "grad_value"_a, "grad_bias"_a, "grad_slopes"_a, "grad_sinks"_a, "scale"_a,
        "softcap"_a, "dropout_p"_a, "dropout_seed"_a, "dropout_offset"_a, "window_left"_a, "window_right"_a,
        "num_threads"_a, "kv_starts"_a = py::none(), "query_lengths"_a = py::none(), "query_segments"_a = py::none(),
        "key_segments"_a = py::none(), "cu_seqlens_q"_a = py::none(), "cu_seqlens_k"_a = py::none());
  m.def("attention_insight", attention_insight, "query"_a, "key"_a, "value"_a, "out"_a, "keys"_a, "weights"_a,
        "entropy"_a, "key_mass"_a, "edges"_a, "distance_mass"_a, "mask"_a, "bias"_a, "kv_lengths"_a, "query_offset"_a,
        "alibi_slopes"_a, "sinks"_a, "scale"_a, "softcap"_a, "window_left"_a, "window_right"_a, "num_threads"_a,
        "kv_starts"_a = py::none(), "query_lengths"_a = py::none(), "query_segments"_a = py::none(),
        "key_segments"_a = py::none());
  m.def("update_caches", update, "tensors"_a, "capacity"_a, "query_step"_a, "interleaved"_a, "num_threads"_a);
  m.def("bind_torch", bind_torch, "tensor"_a, "parameter"_a, "strided"_a, "dtypes"_a, "empty_like"_a, "exchange"_a);
  m.def("attention_cached", cached, "query"_a, "key_cache"_a, "value_cache"_a, "key_scale"_a, "value_scale"_a,
        "new_key"_a, "new_value"_a, "cache_seqlens"_a, "block_table"_a, "rotary_cos"_a, "rotary_sin"_a,
        "rotary_interleaved"_a, "causal"_a, "window"_a, "rolling"_a, "alibi_slopes"_a, "sinks"_a, "softcap"_a,
        "scale"_a, "bshd"_a, "return_lse"_a, "num_threads"_a);
  m.def("attention_plain_numpy", attention_plain_numpy, "query"_a, "key"_a, "value"_a, "kv_lengths"_a, "causal"_a,
        "scale"_a, "bshd"_a, "num_threads"_a);
  m.def("attention_plain_torch", attention_plain_torch, "query"_a, "key"_a, "value"_a, "kv_lengths"_a, "causal"_a,
        "scale"_a, "bshd"_a, "return_lse"_a, "num_threads"_a);
  m.def("attention_plain_backward", plain_backward, "grad_out"_a, "grad_lse"_a, "query"_a, "key"_a, "value"_a, "out"_a,
        "lse"_a, "wanted"_a, "causal"_a, "scale"_a, "bshd"_a, "num_threads"_a);
  m.def("describe_path", describe_path, "dtype"_a, "seqlen_q"_a);
  m.def("compiled_isas", compiled_isas);
  m.def("available_isas", available_isas);
  m.def("selected_isa", selected_isa);
  m.def(
      "select_isa", [](const py::object& name) { select_isa(name.is_none() ? "" : name.cast<std::string>()); },
      "name"_a);
  m.def("cpu_features", features);
  m.def("cpu_name", [] { return std::string(cpu_features().brand); });
  m.def("build_info", build_info);
  m.def("openmp_info", openmp_info);
  m.def("available_cpus", available_cpus);
  m.def("runs_alone", runs_alone);
  m.def("scratch_info", scratch);
  m.def("measure_peak", peak, "kind"_a, "num_threads"_a, "seconds"_a);
  m.def("read_once", read_time, "address"_a, "bytes"_a, "num_threads"_a);
}

}  // namespace fastattn
