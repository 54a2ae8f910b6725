// The table of kernels: the scalar tier fills it, then each tier that this CPU has overwrites the entries it does
// better.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "params.h"

namespace fastattn {

constexpr int kDTypes = 4;

// Attention forward for one element type: of one call or more, whose tasks run side by side, those of the first calls
// first. If there are several, of one type and one number of threads, none has a mask or a bias. May throw
// std::bad_alloc, before anything is written.
using ForwardFn = void (*)(const AttentionParams* calls, int64_t count);
// Attention backward for one element type. The same.
using BackwardFn = void (*)(const BackwardParams* calls, int64_t count);
// What each query looks at, for one element type. May throw std::bad_alloc, before anything is written.
using InsightFn = void (*)(const InsightParams& call);
// Runs `rounds` rounds of independent multiply-adds and returns how many floating-point operations that was.
using PeakFn = double (*)(int64_t rounds);

struct ForwardEntry {
  ForwardFn run;
  const char* isa;   // the tier that filled the entry
  const char* path;  // what it does, for explain()
  const char* few;   // the same for up to few_queries() queries
};

struct KernelTable {
  ForwardEntry forward[kDTypes];  // indexed by DType
  ForwardFn quantised[kDTypes];   // the same, of one call of few queries over a cache of 8-bit numbers
  BackwardFn backward[kDTypes];   // the same
  InsightFn insight[kDTypes];     // the same
  PeakFn peak_fma_f32;
  PeakFn peak_fma_f64;
  PeakFn peak_dot_bf16;  // null where the tier has no bfloat16 product

  void set_forward(DType dtype, ForwardFn run, const char* isa, const char* path,
                   const char* few = "rows of keys read where they lie, for few queries") {
    forward[static_cast<int>(dtype)] = {run, isa, path, few};
  }
  void set_quantised(DType dtype, ForwardFn run) { quantised[static_cast<int>(dtype)] = run; }
  void set_backward(DType dtype, BackwardFn run) { backward[static_cast<int>(dtype)] = run; }
  void set_insight(DType dtype, InsightFn run) { insight[static_cast<int>(dtype)] = run; }
};

// Each tier's entry point, defined in <tier>/kernels.cpp.
void register_scalar(KernelTable& table);
void register_avx2(KernelTable& table);
void register_avx512(KernelTable& table);
void register_avx512_bf16(KernelTable& table);
void register_amx_bf16(KernelTable& table);
void register_amx_fp16(KernelTable& table);

// The kernel of a call in the table in force: float64 queries over quantised keys are left to plain loops.
ForwardFn forward_kernel(const AttentionParams& params);

// The table in force. Throws std::runtime_error when FASTATTN_ISA names a tier that is not there.
const KernelTable& kernels();
const char* selected_isa();

std::vector<std::string> compiled_isas();
std::vector<std::string> available_isas();

// Forces a tier; an empty name goes back to the choice for this CPU (FASTATTN_ISA, else the best).
// Throws std::invalid_argument that lists the tiers of this machine.
void select_isa(const std::string& name);

}  // namespace fastattn
