// The AMX-FP16 tier: float16 on Intel's matrix unit. It overrides float16 alone.
#include "algorithm/forward.h"
#include "algorithm/row_engine.h"
#include "dispatch.h"
#include "isa/amx_bf16/engine.h"

namespace fastattn {
namespace {

// float16 pairs. A probability is split into two float16 numbers, its rounding and the rounding of the rest, which
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

  static FASTATTN_INLINE __m512 pair(__m256i even, __m256i odd) {
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
  }
  static FASTATTN_INLINE void pack_probs(const __m512 (&prob)[2], __m512 (&operand)[2]) {
    __m256i rounded[2];
    __m256i rest[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      rounded[i] = _mm512_cvtps_ph(prob[i], _MM_FROUND_TO_NEAREST_INT);
      rest[i] = _mm512_cvtps_ph(V::sub(prob[i], _mm512_cvtph_ps(rounded[i])), _MM_FROUND_TO_NEAREST_INT);
    }
    operand[0] = pair(rounded[0], rounded[1]);
    operand[1] = pair(rest[0], rest[1]);
  }
  // The block's maximum is known before its first exponential: nothing that was written is ever scaled.
  static FASTATTN_INLINE float scale_probability(float pair, float /*scale*/) { return pair; }

  static FASTATTN_INLINE __m512 load_query(const Float16* row, int count, double factor) {
    const auto* lanes = reinterpret_cast<const float*>(row);
    const __m512 x = count == V::kWidth ? V::load(lanes) : V::load_partial(lanes, count);
    return V::flip_bits(x, factor < 0 ? 0x80008000U : 0);
  }
};

using TilesF16 = AmxEngine<AmxFp16Product>;
using RowsF16 = RowEngine<VecF32, Float16, 256, 2>;

}  // namespace

void register_amx_fp16(KernelTable& table) {
  table.set_forward(DType::float16, forward<RowsF16, TilesF16>, "amx_fp16",
                    "float16 tiles, TDPFP16PS, 32x32 scores, split probabilities");
}

}  // namespace fastattn
