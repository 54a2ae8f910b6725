// The AVX2 tier (with FMA and F16C). 16-bit types are widened to float32 as they are packed.
#include "algorithm/insight_rows.h"
#include "algorithm/peak_loops.h"
#include "algorithm/quantised.h"
#include "algorithm/ragged_backward.h"
#include "algorithm/ragged_forward.h"
#include "algorithm/row_engine.h"
#include "dispatch.h"
#include "isa/avx2/vec.h"

namespace fastattn {
namespace {

// 16 registers: 6 keys by 2 vectors of queries leave 4 for operands, and the softmax reads its scores from memory.
// Blocks of 240 keys, a multiple of 6 and of 8.
template <class Source>
using EngineF32 = Engine<VecF32, Source, FmaProduct<VecF32>, 6, 2, 4, 240, false>;
template <class Source>
using RowsF32 = RowEngine<VecF32, Source, WideDot<VecF32, Source>, 240, 1, 2>;
using Int8Rows = RowEngine<VecF32, float, WideDot<VecF32, Int8>, 240, 1, 2, Int8>;
using Float8Rows = RowEngine<VecF32, float, WideDot<VecF32, Bfloat16>, 240, 1, 2, Float8>;
using EngineF64 = Engine<VecF64, double, FmaProduct<VecF64>, 6, 2, 4, 240, false>;
// The backward keeps P and dS of a block for eight panels in cache: shorter blocks.
template <class V, class Source>
using GradientEngine = Engine<V, Source, FmaProduct<V>, 6, 2, 4, 96, false>;
using RowsF64 = RowEngine<VecF64, double, WideDot<VecF64, double>, 240, 1, 2>;

double peak_fma_f32(int64_t rounds) {
  return run_peak<VecF32>(rounds, 2, [](__m256& sum, __m256 x) FASTATTN_LAMBDA_INLINE {
    __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(sum) : "x"(x));
  });
}

double peak_fma_f64(int64_t rounds) {
  return run_peak<VecF64>(rounds, 2, [](__m256d& sum, __m256d x) FASTATTN_LAMBDA_INLINE {
    __asm__ volatile("vfmadd231pd %1, %1, %0" : "+x"(sum) : "x"(x));
  });
}

}  // namespace

void register_avx2(KernelTable& table) {
  constexpr const char* kIsa = "avx2";
  table.set_forward(DType::float32, forward<RowsF32<float>, EngineF32<float>>, kIsa, "float32 FMA, 6x16 tiles");
  table.set_forward(DType::float64, forward<RowsF64, EngineF64>, kIsa, "float64 FMA, 6x8 tiles");
  table.set_forward(DType::bfloat16, forward<RowsF32<Bfloat16>, EngineF32<Bfloat16>>, kIsa,
                    "widened to float32, FMA, 6x16 tiles");
  table.set_forward(DType::float16, forward<RowsF32<Float16>, EngineF32<Float16>>, kIsa,
                    "widened to float32, FMA, 6x16 tiles");
  table.set_quantised(DType::float32, quantised<float, Int8Rows, Float8Rows>);
  table.set_quantised(DType::bfloat16, quantised<Bfloat16, Int8Rows, Float8Rows>);
  table.set_quantised(DType::float16, quantised<Float16, Int8Rows, Float8Rows>);
  table.set_backward(DType::float32, backward<GradientEngine<VecF32, float>>);
  table.set_backward(DType::float64, backward<GradientEngine<VecF64, double>>);
  table.set_backward(DType::bfloat16, backward<GradientEngine<VecF32, Bfloat16>>);
  table.set_backward(DType::float16, backward<GradientEngine<VecF32, Float16>>);
  table.set_insight(DType::float32, insight<RowsF32<float>, EngineF32<float>>);
  table.set_insight(DType::float64, insight<RowsF64, EngineF64>);
  table.set_insight(DType::bfloat16, insight<RowsF32<Bfloat16>, EngineF32<Bfloat16>>);
  table.set_insight(DType::float16, insight<RowsF32<Float16>, EngineF32<Float16>>);
  table.peak_fma_f32 = peak_fma_f32;
  table.peak_fma_f64 = peak_fma_f64;
}

}  // namespace fastattn
