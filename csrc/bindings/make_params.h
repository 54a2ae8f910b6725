// Turns the tuples that Python hands down into AttentionParams, checking all that memory safety asks for: dtype codes,
// ranks, sizes that agree, strides that are not negative, addresses that are there.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
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

template <int rank>
void copy_strides(const TensorView& view, int64_t (&strides)[rank]) {
  for (int i = 0; i < rank; ++i) {
    strides[i] = view.strides[i];
  }
}

// So many elements of the widest type, eight bytes, are still counted in 64-bit sizes.
constexpr int64_t kMaxElements = int64_t{1} << 59;

// Throws std::invalid_argument naming the argument, as all that follows does.
[[noreturn]] void fail(const char* name, const std::string& what);
// Reads a tuple (address, dtype code, sizes, strides), and checks that it can be addressed.
TensorView read_tuple(const char* name, const pybind11::object& from, int rank);
void expect_sizes(const char* name, const TensorView& view, std::initializer_list<int64_t> sizes);
void expect_code(const char* name, const TensorView& view, int code);
// The numbers of a vector of that type and size, one behind the other.
const void* numbers_of(const char* name, const TensorView& view, int code, int64_t size);
bool holds_integers(const TensorView& view);
// Of a view that holds integers.
int64_t integer_at(const TensorView& view, int64_t index);
// Throws unless it is a table of page numbers, (batch, slots).
void expect_table(const TensorView& table, int64_t batch);
// The page that a sequence's slot names; throws where there is none.
int64_t page_at(const TensorView& table, int64_t sequence, int64_t slot, int64_t num_pages);
// Throws where the view cannot be addressed.
void check_view(const char* name, const TensorView& view);
// Sets dtype, sizes, and the three tensors; throws std::invalid_argument where they do not fit each other.
void set_inputs(const TensorView& query, const TensorView& key, const TensorView& value, AttentionParams& p);
void set_out(const TensorView& out, AttentionParams& p);

// Page numbers that have been looked at, so that what a kernel reads through is what was checked.
using Pages = std::vector<int64_t>;
// The same of keys and values in pages, (pages, Hkv, page_size, D); of `table`, (B, slots), what the lengths reach is
// checked and copied. The parameters point into `pages` and to `kv_lengths`, (B,).
void set_paged_inputs(const TensorView& query, TensorView key, TensorView value, const TensorView& table,
                      const int64_t* kv_lengths, AttentionParams& p, Pages& pages);
// What multiplies the rows `of` keys or values.
void set_scales(const char* name, const TensorView& view, const TensorView& of, const float*& to,
                int64_t (&strides)[3]);

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
