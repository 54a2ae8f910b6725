// Rows of 8-bit floating-point numbers as the products of Method::rows read them: some at a time become bfloat16, which
// holds each such number exactly, in the first-level cache. (docs/decisions/0016)
#pragma once

#include "algorithm/row_table.h"

namespace fastattn {
namespace {

// Rows [0, count) of so many numbers, one behind the other; behind the last, up to a vector of others. As long as they
// are decoded, those that come `ahead` rows later are asked for.
template <class V, class Code>
FASTATTN_NOINLINE void decode_rows(const char* const* rows, int64_t count, int64_t columns, int64_t ahead,
                                   Bfloat16* out) {
  static const Float8Specials<Code> specials;
  for (int64_t i = 0; i < count; ++i, out += columns) {
    const auto* row = reinterpret_cast<const Code*>(rows[i]);
    prefetch_row(rows[i + ahead], columns);
    int64_t d = 0;
    for (; d + 2 * V::kWidth <= columns; d += 2 * V::kWidth) {
      V::decode(row + d, specials, out + d);
    }
    for (; d < columns; ++d) {
      out[d] = to_bfloat16(row[d]);
    }
  }
}

// Room for rows of so many columns, that are decoded together.
template <class E>
class DecodedRows {
  using V = typename E::V;
  static constexpr int64_t kOthers = 64;  // numbers behind the last row

 public:
  DecodedRows(DType stored, int64_t columns) : stored_(stored), columns_(columns) {
    // Products look at some rows more than they multiply.
    for (int64_t i = 0; i < most() + 4; ++i) {
      rows_[i] = reinterpret_cast<const char*>(numbers_ + min64(i, most() - 1) * columns);
    }
  }

  int64_t most() const { return rows_at_once<E>(columns_); }

  const char* const* decode(const char* const* rows, int64_t count) {
    const bool e4m3 = stored_ == DType::float8_e4m3fn;
    if constexpr (E::Dot::kLooksUp) {
      E::Dot::look_up(rows, count, columns_, kRowsAhead<E>, float8_table(e4m3), numbers_);
    } else {
      (e4m3 ? decode_rows<V, Float8E4M3> : decode_rows<V, Float8E5M2>)(rows, count, columns_, kRowsAhead<E>, numbers_);
    }
    return rows_;
  }

 private:
  DType stored_;
  int64_t columns_;
  const char* rows_[kMostRowsAtOnce + 4];
  alignas(64) Bfloat16 numbers_[kLeastRowsAtOnce * kMaxHeadDim + kOthers];
};

}  // namespace
}  // namespace fastattn
