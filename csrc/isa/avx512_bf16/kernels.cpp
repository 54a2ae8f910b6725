// The AVX512_BF16 tier: bfloat16 operands stay bfloat16, two a lane, multiplied by VDPBF16PS. It overrides bfloat16
// alone.
#include "algorithm/forward.h"
#include "algorithm/peak_loops.h"
#include "dispatch.h"
#include "isa/avx512/vec.h"

namespace fastattn {
namespace {

// sum += a.even * b.even + a.odd * b.odd in every 32-bit lane.
struct Bf16PairProduct {
  using V = VecF32;
  using Element = Bfloat16;
  static constexpr int kDepth = 2;
  // A scale rounded into a bfloat16 query would cost six times the error that the query itself has.
  static constexpr bool kScaleQuery = false;
  static constexpr Precision kExpPrecision = Precision::bfloat16;

  static FASTATTN_INLINE __m512 run(__m512 a, __m512 b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static FASTATTN_INLINE __m512 poison(__m512 x, __m512 zero, __m512 sum) {
    return V::fma(V::low_half(x), zero, V::fma(V::high_half(x), zero, sum));
  }
  // Lane i pairs the even key's probability (low half) with the odd key's.
  static FASTATTN_INLINE __m512 probabilities(const __m512 (&prob)[2]) {
    const auto halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(prob[1], prob[0]));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves));
  }
  static float scale_probability(float pair, float scale) {
    const uint32_t bits = float_to_bits(pair);
    const Bfloat16 low = to_bfloat16(bits_to_float(bits << 16) * scale);
    const Bfloat16 high = to_bfloat16(bits_to_float(bits & 0xffff0000U) * scale);
    return bits_to_float(low.bits | uint32_t{high.bits} << 16);
  }
  // Of the factor only the sign, as a flipped bit.
  static FASTATTN_INLINE __m512 load_query(const Bfloat16* row, int count, double factor) {
    const auto* lanes = reinterpret_cast<const float*>(row);
    const __m512 x = count == V::kWidth ? V::load(lanes) : V::load_partial(lanes, count);
    return V::flip_bits(x, factor < 0 ? 0x80008000U : 0);
  }
};

using EngineBf16 = Engine<VecF32, Bfloat16, Bf16PairProduct, 8, 2, 8, 256, true>;

double peak_dot_bf16(int64_t rounds) {
  return run_peak<VecF32>(rounds, 4, [](__m512& sum, __m512 x) FASTATTN_LAMBDA_INLINE {
    __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(x));
  });
}

}  // namespace

void register_avx512_bf16(KernelTable& table) {
  table.set_forward(DType::bfloat16, forward<EngineBf16>, "avx512_bf16", "bfloat16 pairs, VDPBF16PS, 8x32 tiles");
  table.peak_dot_bf16 = peak_dot_bf16;
}

}  // namespace fastattn
