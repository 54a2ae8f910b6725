// The AVX-512 tier. 16-bit types are widened to float32 as they are packed.
#include "algorithm/insight_rows.h"
#include "algorithm/peak_loops.h"
#include "algorithm/quantised.h"
#include "algorithm/ragged_backward.h"
#include "algorithm/ragged_forward.h"
#include "algorithm/row_engine.h"
#include "dispatch.h"
#include "isa/avx512/vec.h"

namespace fastattn {
namespace {

// Tile of 8 keys by 32 queries: 16 accumulators. It and the 8 x 32 tile of the second product run at the FMA ceiling;
// 12 and 14 rows, and 64 columns, lost 3 to 8 points. Blocks of 256 keys: 32 KiB of probabilities.
template <class Source>
using EngineF32 = Engine<VecF32, Source, FmaProduct<VecF32>, 8, 2, 8, 256, true>;
// Where values are widened seven rows share one; in float32, where they are not, three and four read less.
template <class Source>
using RowsF32 = RowEngine<VecF32, Source, WideDot<VecF32, Source>, 1024, 6, sizeof(Source) == 2 ? 7 : 6>;
using Int8Rows = RowEngine<VecF32, float, WideDot<VecF32, Int8>, 1024, 6, 7, Int8>;
using Float8Rows = RowEngine<VecF32, float, WideDot<VecF32, Bfloat16>, 1024, 6, 7, Float8>;
using EngineF64 = Engine<VecF64, double, FmaProduct<VecF64>, 8, 2, 8, 256, true>;
// The backward keeps P and dS of a block for eight panels in cache: shorter blocks.
template <class V, class Source>
using GradientEngine = Engine<V, Source, FmaProduct<V>, 8, 2, 8, 128, true>;
using RowsF64 = RowEngine<VecF64, double, WideDot<VecF64, double>, 1024, 6, 6>;

double peak_fma_f32(int64_t rounds) {
  return run_peak<VecF32>(rounds, 2, [](__m512& sum, __m512 x) FASTATTN_LAMBDA_INLINE {
    __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(sum) : "v"(x));
  });
}

double peak_fma_f64(int64_t rounds) {
  return run_peak<VecF64>(rounds, 2, [](__m512d& sum, __m512d x) FASTATTN_LAMBDA_INLINE {
    __asm__ volatile("vfmadd231pd %1, %1, %0" : "+v"(sum) : "v"(x));
  });
}

}  // namespace

void register_avx512(KernelTable& table) {
  constexpr const char* kIsa = "avx512";
  table.set_forward(DType::float32, forward<RowsF32<float>, EngineF32<float>>, kIsa, "float32 FMA, 8x32 tiles");
  table.set_forward(DType::float64, forward<RowsF64, EngineF64>, kIsa, "float64 FMA, 8x16 tiles");
  table.set_forward(DType::bfloat16, forward<RowsF32<Bfloat16>, EngineF32<Bfloat16>>, kIsa,
                    "widened to float32, FMA, 8x32 tiles");
  table.set_forward(DType::float16, forward<RowsF32<Float16>, EngineF32<Float16>>, kIsa,
                    "widened to float32, FMA, 8x32 tiles");
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
