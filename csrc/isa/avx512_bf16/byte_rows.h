// Few queries over caches of 8-bit numbers where a CPU multiplies words and looks bytes up. Words round queries and
// probabilities by more than float16 allows.
#pragma once

#include "algorithm/quantised.h"
#include "dispatch.h"
#include "isa/avx512_bf16/float8_lookup.h"
#include "isa/avx512_bf16/word_product.h"

namespace fastattn {
namespace {

using WordRows = RowEngine<VecF32, float, WordDot, 1024, 4, 5, Int8>;

inline void set_byte_rows(KernelTable& table) {
  using WideRows = RowEngine<VecF32, float, WideDot<VecF32, Int8>, 1024, 6, 7, Int8>;
  using Float8Rows = RowEngine<VecF32, float, LookupDot<WideDot<VecF32, Bfloat16>>, 1024, 6, 7, Float8>;
  table.set_quantised(DType::float32, quantised<float, WideRows, Float8Rows>);
  table.set_quantised(DType::bfloat16, quantised<Bfloat16, WordRows, Float8Rows>);
  table.set_quantised(DType::float16, quantised<Float16, WideRows, Float8Rows>);
}

}  // namespace
}  // namespace fastattn
