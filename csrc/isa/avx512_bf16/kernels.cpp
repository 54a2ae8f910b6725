// The AVX512_BF16 tier: bfloat16 operands stay bfloat16, two a lane, multiplied by VDPBF16PS. It overrides bfloat16
// alone, and caches of 8-bit numbers: bfloat16 multiplies int8 as words (VPDPWSSD), float8 is looked up.
#include "algorithm/insight_rows.h"
#include "algorithm/peak_loops.h"
#include "algorithm/ragged_backward.h"
#include "algorithm/ragged_forward.h"
#include "algorithm/row_engine.h"
#include "dispatch.h"
#include "isa/avx512_bf16/byte_rows.h"
#include "isa/avx512_bf16/pair_product.h"

namespace fastattn {
namespace {

using EngineBf16 = Engine<VecF32, Bfloat16, Bf16PairProduct, 8, 2, 8, 256, true>;
// Its weights are results themselves, of float32: exponentials are as exact.
struct ExactPairProduct : Bf16PairProduct {
  static FASTATTN_INLINE __m512 power(__m512 x) { return exp2<V>(x); }
};
using InsightBf16 = Engine<VecF32, Bfloat16, ExactPairProduct, 8, 2, 8, 256, true>;
using GradientBf16 = Engine<VecF32, Bfloat16, Bf16PairProduct, 8, 2, 8, 128, true>;
using RowsBf16 = RowEngine<VecF32, Bfloat16, PairDot, 1024, 6, 6>;
using Float8PairRows = RowEngine<VecF32, Bfloat16, LookupDot<PairDot>, 1024, 6, 6, Float8>;

double peak_dot_bf16(int64_t rounds) {
  return run_peak<VecF32>(rounds, 4, [](__m512& sum, __m512 x) FASTATTN_LAMBDA_INLINE {
    __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(x));
  });
}

}  // namespace

void register_avx512_bf16(KernelTable& table) {
  table.set_forward(DType::bfloat16, forward<RowsBf16, EngineBf16>, "avx512_bf16",
                    "bfloat16 pairs, VDPBF16PS, 8x32 tiles");
  set_byte_rows(table);
  table.set_quantised(DType::bfloat16, quantised<Bfloat16, WordRows, Float8PairRows>);
  table.set_backward(DType::bfloat16, backward<GradientBf16>);
  table.set_insight(DType::bfloat16, insight<RowsBf16, InsightBf16>);
  table.peak_dot_bf16 = peak_dot_bf16;
}

}  // namespace fastattn
