// The AMX engine for 16-bit types: tiles of 16 rows by 64 bytes.
//
// Scores are transposed here too: K rows are the left operand where they lie, the queries' pairs the right one. The
// second product is transposed as well, columns of V by probabilities, so that probabilities stay where the softmax
// left them; V is packed as tiles of columns for that.
#pragma once

#include "algorithm/engine.h"
#include "isa/avx512_bf16/pair_product.h"

namespace fastattn {
namespace {

// The compiler's own intrinsics say nothing of the memory that a tile load reads.
#define FASTATTN_TILE_LOAD(tile, base, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(base), "r"(stride) : "memory")
// The same for operands that stream past and need not stay in the nearest cache, where they would push out what does:
// packed values loaded so make the second product a quarter faster.
#define FASTATTN_TILE_STREAM(tile, base, stride) \
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile::"r"(base), "r"(stride) : "memory")
#define FASTATTN_TILE_STORE(tile, base, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(base), "r"(stride) : "memory")
#define FASTATTN_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile::)

// bfloat16 tiles. Every CPU with AMX has quick VREDUCEPS and VSCALEFPS.
struct AmxBf16Product : Bf16PairProduct {
  static FASTATTN_INLINE __m512 power(__m512 x) { return exp2_by_scale<VecF32, Precision::bfloat16>(x); }

  template <int sum, int a, int b>
  static FASTATTN_INLINE void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
  }
};

template <class Product_>
struct AmxEngine {
  using V = VecF32;
  using Reg = typename V::Reg;
  using Scalar = float;
  using Product = Product_;
  using Source = typename Product::Element;
  using Stored = Source;
  using Element = typename Product::Element;
  using Prob = typename Product::Prob;
  using Rounded = Prob;

  static constexpr Method kMethod = Method::tiles;
  static constexpr int kWidth = V::kWidth;
  static constexpr int kDepth = 2;
  static constexpr int kPlanes = Product::kPlanes;
  static constexpr int kKeys = 32;      // two tiles of keys by two of queries
  static constexpr int kGroupKeys = 8;  // as many scores as the registers hold
  static constexpr int kVectors = 2;
  static constexpr int kLanes = 32;
  static constexpr int kRows = 32;
  static constexpr int kBlockKeys = 256;
  static constexpr bool kFused = false;
  static constexpr int kDimMultiple = 32;  // elements of a tile row
  static constexpr int kHeadMultiple = kBlockKeys;
  static constexpr bool kConvert = false;
  static constexpr bool kPacksValue = true;
  static constexpr bool kObserves = false;

  static constexpr int kTile = 16;  // rows of a tile, and 32-bit lanes of one of its rows
  static constexpr long kLaneRowBytes = kLanes * 4;
  static constexpr long kTileBytes = kTile * 64;
  // Packed values are tiles of 16 columns by 32 keys, each in one piece; this many bytes a row of tiles.
  static constexpr long kTileRowBytes = kBlockKeys / kDimMultiple * kTileBytes;

  // Every tile 16 rows of 64 bytes.
  static void enter() {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  static void leave() { __asm__ volatile("tilerelease" ::); }

  // Scores of 32 keys into the first four tiles.
  template <int kActive>
  static FASTATTN_INLINE void multiply_tiles(const char* key, int64_t key_stride, const float* query, int64_t steps) {
    const char* low = key;
    const char* high = key + kTile * key_stride;
    FASTATTN_TILE_ZERO(0);
    FASTATTN_TILE_ZERO(1);
    FASTATTN_TILE_ZERO(2);
    FASTATTN_TILE_ZERO(3);
    for (int64_t k = 0; k < steps; k += kTile) {
      FASTATTN_TILE_LOAD(4, low + k * 4, key_stride);
      FASTATTN_TILE_LOAD(6, query + k * kLanes, kLaneRowBytes);
      Product::template dot<0, 4, 6>();
      FASTATTN_TILE_LOAD(5, high + k * 4, key_stride);
      Product::template dot<1, 5, 6>();
      if constexpr (kActive == 2) {
        FASTATTN_TILE_LOAD(7, query + k * kLanes + kTile, kLaneRowBytes);
        Product::template dot<2, 4, 7>();
        Product::template dot<3, 5, 7>();
      }
    }
  }

  template <int kActive>
  static FASTATTN_INLINE void store_tiles(float* raw) {
    FASTATTN_TILE_STORE(0, raw, kLaneRowBytes);
    FASTATTN_TILE_STORE(1, raw + kTile * kLanes, kLaneRowBytes);
    if constexpr (kActive == 2) {
      FASTATTN_TILE_STORE(2, raw + kTile, kLaneRowBytes);
      FASTATTN_TILE_STORE(3, raw + kTile * kLanes + kTile, kLaneRowBytes);
    }
  }

  // output[column][lane] += value[column][key] * probs[key][lane] over keys [begin, end) of the block, two tiles of
  // columns by two of lanes at a time. Padding columns are computed with the others.
  static FASTATTN_NOINLINE void accumulate_tiles(float* output, const float* probs, const char* value, int64_t begin,
                                                 int64_t end, int64_t columns, int live) {
    for (int64_t d = 0; d < columns; d += 2 * kTile) {
      float* sums = output + d * kLanes;
      const char* rows = value + d / kTile * kTileRowBytes;
      if (d + kTile < columns) {
        accumulate_square<2>(sums, probs, rows, begin, end, live);
      } else {
        accumulate_square<1>(sums, probs, rows, begin, end, live);
      }
    }
  }

  // Sixteen steps of values, [step][column] pairs of keys, to tiles of columns: 32 keys from `key` on.
  static void pack_value_group(const float (&steps)[kTile][kMaxValueDim], int64_t columns, int64_t key, char* out) {
    for (int64_t d = 0; d < columns; d += kTile) {
      typename V::Reg r[kTile];
      for (int i = 0; i < kTile; ++i) {
        r[i] = V::load(&steps[i][d]);
      }
      V::transpose(r);
      char* tile = out + d / kTile * kTileRowBytes + key / kDimMultiple * kTileBytes;
      for (int i = 0; i < kTile; ++i) {
        V::store(reinterpret_cast<float*>(tile + i * 64), r[i]);
      }
    }
  }

 private:
  template <int kColumnTiles>
  static FASTATTN_INLINE void accumulate_square(float* sums, const float* probs, const char* rows, int64_t begin,
                                                int64_t end, int live) {
    const bool wide = live > kTile;
    FASTATTN_TILE_LOAD(0, sums, kLaneRowBytes);
    FASTATTN_TILE_LOAD(1, sums + kTile, kLaneRowBytes);
    if constexpr (kColumnTiles == 2) {
      FASTATTN_TILE_LOAD(2, sums + kTile * kLanes, kLaneRowBytes);
      FASTATTN_TILE_LOAD(3, sums + kTile * kLanes + kTile, kLaneRowBytes);
    }
    for (int64_t key = begin; key < end; key += 2 * kTile) {
      FASTATTN_TILE_STREAM(4, rows + key / kDimMultiple * kTileBytes, 64L);
      if constexpr (kColumnTiles == 2) {
        FASTATTN_TILE_STREAM(5, rows + kTileRowBytes + key / kDimMultiple * kTileBytes, 64L);
      }
      for (int plane = 0; plane < kPlanes; ++plane) {
        const float* pairs = probs + plane * kPlaneSize<AmxEngine> + key / 2 * kLanes;
        FASTATTN_TILE_LOAD(6, pairs, kLaneRowBytes);
        Product::template dot<0, 4, 6>();
        if constexpr (kColumnTiles == 2) {
          Product::template dot<2, 5, 6>();
        }
        if (wide) {
          FASTATTN_TILE_LOAD(7, pairs + kTile, kLaneRowBytes);
          Product::template dot<1, 4, 7>();
          if constexpr (kColumnTiles == 2) {
            Product::template dot<3, 5, 7>();
          }
        }
      }
    }
    FASTATTN_TILE_STORE(0, sums, kLaneRowBytes);
    FASTATTN_TILE_STORE(1, sums + kTile, kLaneRowBytes);
    if constexpr (kColumnTiles == 2) {
      FASTATTN_TILE_STORE(2, sums + kTile * kLanes, kLaneRowBytes);
      FASTATTN_TILE_STORE(3, sums + kTile * kLanes + kTile, kLaneRowBytes);
    }
  }
};

}  // namespace
}  // namespace fastattn
