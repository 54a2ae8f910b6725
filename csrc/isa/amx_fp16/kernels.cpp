// The AMX-FP16 tier: float16 on Intel's matrix unit. It overrides float16 alone.
#include "algorithm/ragged_forward.h"
#include "algorithm/row_engine.h"
#include "dispatch.h"
#include "isa/amx_bf16/engine.h"

namespace fastattn {
namespace {

// float16 pairs. A probability is split into two float16 numbers, its leading bits and the rounding of the rest, which
// together hold it to 2^-22: rounded once, as is common, it would cost up to 2^-11 of every output. The largest is kept
// near 2^13, so that small ones are not lost below float16's range.
struct AmxFp16Product {
  using V = VecF32;
  using Element = Float16;
  using Prob = Float16;
  static constexpr int kDepth = 2;
  static constexpr int kPlanes = 2;
  static constexpr double kHeadroom = 13;
  static constexpr bool kScaleQuery = false;

  // TDPFP16PS in bytes, for assemblers that do not know it.
  template <int sum, int a, int b>
  static FASTATTN_INLINE void dot() {
    __asm__ volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"(0x7b - 8 * b), "i"(0xc0 + 8 * sum + a));
  }
  static FASTATTN_INLINE __m512 power(__m512 x) { return exp2_by_scale<V, Precision::full>(x); }

  static FASTATTN_INLINE __m512 pair(const __m512 (&x)[2]) {
    const __m256i even = _mm512_cvtps_ph(x[0], _MM_FROUND_TO_NEAREST_INT);
    const __m256i odd = _mm512_cvtps_ph(x[1], _MM_FROUND_TO_NEAREST_INT);
    return pair_halves(_mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1));
  }
  static FASTATTN_INLINE void pack_probs(const __m512 (&prob)[2], __m512 (&operand)[2]) {
    const __m512 leading =
        _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xffffe000U)));  // float16's eleven bits
    __m512 high[2];
    __m512 rest[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      high[i] = _mm512_and_ps(prob[i], leading);
      rest[i] = V::sub(prob[i], high[i]);
    }
    operand[0] = pair(high);
    operand[1] = pair(rest);
  }
  static FASTATTN_INLINE __m512 load_query(const Float16* row, int count, double factor) {
    const auto* lanes = reinterpret_cast<const float*>(row);
    const __m512 x = count == V::kWidth ? V::load(lanes) : V::load_partial(lanes, count);
    return V::flip_bits(x, factor < 0 ? 0x80008000U : 0);
  }
};

using TilesF16 = AmxEngine<AmxFp16Product>;
using RowsF16 = RowEngine<VecF32, Float16, WideDot<VecF32, Float16>, 1024, 6, 7>;

}  // namespace

void register_amx_fp16(KernelTable& table) {
  table.set_forward(DType::float16, forward<RowsF16, TilesF16>, "amx_fp16",
                    "float16 tiles, TDPFP16PS, 32x32 scores, split probabilities");
}

}  // namespace fastattn
