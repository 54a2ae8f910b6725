// Turns the tuples that Python hands down into AttentionParams, checking all that memory safety asks for: dtype codes,
// ranks, sizes that agree, strides that are not negative, addresses that are there.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "bindings/segments.h"
#include "bindings/sequences.h"
#include "params.h"

namespace fastattn {

// The tensors of one call as Python gives them: (address, dtype code, sizes, strides), or None.
struct TensorArguments {
  pybind11::object query, key, value, out, lse, weights, mask, bias, kv_lengths, query_offset, alibi_slopes, sinks;
  pybind11::object kv_starts = pybind11::none();
  pybind11::object query_lengths = pybind11::none();
  pybind11::object query_segments = pybind11::none();
  pybind11::object key_segments = pybind11::none();
  pybind11::object block_table = pybind11::none();
  pybind11::object key_scales = pybind11::none();
  pybind11::object value_scales = pybind11::none();
  pybind11::object cu_seqlens_q = pybind11::none();
  pybind11::object cu_seqlens_k = pybind11::none();
};

// One of them, read: canonical axes, strides in elements.
struct TensorView {
  static constexpr int kMaxRank = 4;
  void* data = nullptr;
  int code = -1;
  int rank = 0;
  int64_t sizes[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};
};

// So many elements of the widest type, eight bytes, are still counted in 64-bit sizes.
constexpr int64_t kMaxElements = int64_t{1} << 59;

// Throws std::invalid_argument where the view cannot be addressed.
void check_view(const char* name, const TensorView& view);
// Sets dtype, sizes, and the three tensors; throws std::invalid_argument where they do not fit each other.
void set_inputs(const TensorView& query, const TensorView& key, const TensorView& value, AttentionParams& p);
void set_out(const TensorView& out, AttentionParams& p);

// Page numbers that have been looked at, so that what a kernel reads through is what was checked.
using Pages = std::vector<int64_t>;

// What is made of arguments, and is read by kernels in their place.
struct Derived {
  Pages pages;
  SegmentRanges segments;
  Starts query_starts;  // of sequences behind one another, if they are
  Starts key_starts;

  int64_t sequences(int64_t batch) const {
    return query_starts.empty() ? batch : static_cast<int64_t>(query_starts.size()) - 1;
  }
};

// Throws std::invalid_argument (ValueError) naming the argument. Scalars are left to the caller. The parameters point
// into `derived`. Those of sequences behind one another are of all, and have yet to be taken apart.
AttentionParams make_params(const TensorArguments& tensors, Derived& derived);

// What a backward call has besides: the same, or None. `forward` holds out and lse.
struct GradientArguments {
  TensorArguments forward;
  pybind11::object grad_out, grad_lse, grad_weights, grad_query, grad_key, grad_value, grad_bias, grad_slopes,
      grad_sinks;
};

BackwardParams make_backward_params(const GradientArguments& tensors, Derived& derived);

// The codes of Tensor tuples: DType's, and these.
enum TensorCode { kCodeBool = 4, kCodeInt64 = 5, kCodeInt32 = 9 };
pybind11::dict dtype_codes();

}  // namespace fastattn
