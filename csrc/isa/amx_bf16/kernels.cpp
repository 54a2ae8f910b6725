// The AMX tier: bfloat16 on Intel's matrix unit. It overrides bfloat16 alone, and
// caches of 8-bit numbers.
#include "algorithm/ragged_forward.h"
#include "algorithm/row_engine.h"
#include "dispatch.h"
#include "isa/amx_bf16/engine.h"
#include "isa/avx512_bf16/byte_rows.h"

namespace fastattn {
namespace {

using TilesBf16 = AmxEngine<AmxBf16Product>;
using RowsBf16 = RowEngine<VecF32, Bfloat16, WideDot<VecF32, Bfloat16>, 1024, 6, 6>;

// Four sums, as the kernels keep; operands are zero, which the unit multiplies no faster.
double peak_dot_bf16(int64_t rounds) {
  TilesBf16::enter();
  FASTATTN_TILE_ZERO(0);
  FASTATTN_TILE_ZERO(1);
  FASTATTN_TILE_ZERO(2);
  FASTATTN_TILE_ZERO(3);
  FASTATTN_TILE_ZERO(4);
  FASTATTN_TILE_ZERO(5);
  for (int64_t round = 0; round < rounds; ++round) {
    AmxBf16Product::dot<0, 4, 5>();
    AmxBf16Product::dot<1, 4, 5>();
    AmxBf16Product::dot<2, 4, 5>();
    AmxBf16Product::dot<3, 4, 5>();
  }
  TilesBf16::leave();
  return static_cast<double>(rounds) * 4 * 16 * 16 * 32 * 2;
}

}  // namespace

void register_amx_bf16(KernelTable& table) {
  table.set_forward(DType::bfloat16, forward<RowsBf16, TilesBf16>, "amx_bf16",
                    "bfloat16 tiles, TDPBF16PS, 32x32 scores");
  set_byte_rows(table);
  table.peak_dot_bf16 = peak_dot_bf16;
}

}  // namespace fastattn
