// The sums of a panel over one chunk of keys, and how those of two chunks become one.
#pragma once

#include "algorithm/panel.h"

namespace fastattn {
namespace {

// Where they stand: in a panel, or in memory of their own.
template <class E>
struct ChunkSums {
  using Scalar = typename E::Scalar;
  Scalar* shift;   // a lane each
  Scalar* sum;     // the same
  Scalar* output;  // as a panel's, see output_index

  static constexpr int64_t bytes(int64_t output_stride) {
    return (2 + output_stride) * E::kLanes * static_cast<int64_t>(sizeof(Scalar));
  }
  static ChunkSums at(char* memory) {
    auto* numbers = reinterpret_cast<Scalar*>(memory);
    return {numbers, numbers + E::kLanes, numbers + 2 * E::kLanes};
  }
  static ChunkSums of(Panel<E>& panel) { return {panel.shift, panel.sum, panel.output}; }

  // Nothing of any lane; what `output` holds is not looked at then.
  void clear() const {
    memset(shift, 0, E::kLanes * sizeof *shift);
    memset(sum, 0, E::kLanes * sizeof *sum);
  }
};

// into += from, for the first `lanes` lanes: both under the higher of the two shifts. A chunk of which a row saw
// nothing changes no bit of it, and what is added to nothing is copied. `to_log2` is of the shifts.
template <class E>
FASTATTN_NOINLINE void add_chunk(const ChunkSums<E>& into, const ChunkSums<E>& from, int lanes, int64_t output_stride,
                                 double to_log2) {
  using Scalar = typename E::Scalar;
  for (int lane = 0; lane < lanes; ++lane) {
    if (from.sum[lane] == 0) {
      continue;
    }
    const auto each = [&](auto combine) FASTATTN_LAMBDA_INLINE {
      for (int64_t d = 0; d < output_stride; ++d) {
        const int64_t index = output_index<E>(lane, d, output_stride);
        into.output[index] = combine(into.output[index], from.output[index]);
      }
    };
    if (into.sum[lane] == 0) {
      into.shift[lane] = from.shift[lane];
      into.sum[lane] = from.sum[lane];
      each([](Scalar /*old*/, Scalar x) FASTATTN_LAMBDA_INLINE { return x; });
      continue;
    }
    const auto below = static_cast<double>(into.shift[lane]) - static_cast<double>(from.shift[lane]);
    const auto scale = static_cast<Scalar>(::exp2(-__builtin_fabs(below) * to_log2));
    const Scalar old_scale = below < 0 ? scale : 1;
    const Scalar new_scale = below < 0 ? 1 : scale;
    into.shift[lane] = below < 0 ? from.shift[lane] : into.shift[lane];
    into.sum[lane] = into.sum[lane] * old_scale + from.sum[lane] * new_scale;
    each([&](Scalar old, Scalar x) FASTATTN_LAMBDA_INLINE { return old * old_scale + x * new_scale; });
  }
}

}  // namespace
}  // namespace fastattn
