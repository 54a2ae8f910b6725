// What this machine can give at most, measured with the tier in force: the ceilings benchmarks are held against.
#pragma once

#include <cstdint>
#include <string>

namespace fastattn {

// Kinds: "fma_f32", "fma_f64", "dot_bf16" (GFLOP/s; 0 where the tier has no such product) and "read" (GB/s of a
// streaming read). Throws std::invalid_argument for any other.
double measure_peak(const std::string& kind, int num_threads, double seconds);

// Seconds of one streaming read of `bytes` at `from`, aligned to 8: the floor of whoever reads this memory.
double read_once(const void* from, int64_t bytes, int num_threads);

}  // namespace fastattn
