// Calls over caches, straight from the arrays to the kernels: the short way of attention_with_kvcache, as plain_call.h
// is that of attention.
#pragma once

#include <pybind11/pybind11.h>

namespace fastattn {

// The arguments of attention_with_kvcache as they came: arrays, None, numbers.
struct CachedArguments {
  pybind11::handle query, key_cache, value_cache, key_scale, value_scale, new_key, new_value, cache_seqlens,
      block_table, rotary_cos, rotary_sin, window, alibi_slopes, sinks, softcap, scale;
  bool rotary_interleaved, causal, rolling, bshd, return_lse;
};

// Returns out or (out, lse), or None for a call that needs a closer look; nothing has been written then. The caller
// knows what that of attention_plain_torch knows, and that nothing requires grad; he counts what is written in place.
pybind11::object attention_cached(const CachedArguments& arguments, int num_threads);

}  // namespace fastattn
