// The dense arguments, mask and bias, over one panel and key block: transposed so that lanes are lanes, with what they
// hide gathered as bits, so that the score tiles read them like anything else.
#pragma once

#include "algorithm/panel.h"
#include "algorithm/score_tile.h"

namespace fastattn {
namespace {

// Bit i of byte j <-> bit j of byte i.
inline uint64_t transpose_bits(uint64_t x) {
  uint64_t swap = (x ^ (x >> 7)) & 0x00aa00aa00aa00aaULL;
  x ^= swap ^ (swap << 7);
  swap = (x ^ (x >> 14)) & 0x0000cccc0000ccccULL;
  x ^= swap ^ (swap << 14);
  swap = (x ^ (x >> 28)) & 0x00000000f0f0f0f0ULL;
  return x ^ swap ^ (swap << 28);
}

// Eight mask bytes as eight bits, the first lowest.
inline uint64_t pack_bytes(uint64_t bytes) {
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7fULL;
  const uint64_t nonzero = ((((bytes & kLow) + kLow) | bytes) >> 7) & 0x0101010101010101ULL;
  return (nonzero * 0x0102040810204080ULL) >> 56;
}

// visible[key - begin] bit `lane`, for keys [begin, end) of the head.
template <class E>
FASTATTN_NOINLINE void read_mask(const Panel<E>& panel, int64_t key_stride, int64_t begin, int64_t end,
                                 uint32_t* visible) {
  constexpr uint32_t kAll = E::kLanes == 32 ? ~0U : (1U << E::kLanes) - 1U;
  if (panel.mask_shared) {
    for (int64_t key = begin; key < end; ++key) {
      visible[key - begin] = panel.mask_row[0][key * key_stride] != 0 ? kAll : 0;
    }
    return;
  }
  int64_t key = begin;
  if (E::kLanes % 8 == 0 && key_stride == 1) {
    for (; key + 8 <= end; key += 8) {
      uint64_t bytes[E::kLanes / 8];
      for (int group = 0; group < E::kLanes / 8; ++group) {
        uint64_t square = 0;
        for (int i = 0; i < 8; ++i) {
          uint64_t eight;
          memcpy(&eight, panel.mask_row[group * 8 + i] + key, sizeof eight);
          square |= pack_bytes(eight) << (8 * i);
        }
        bytes[group] = transpose_bits(square);
      }
      for (int i = 0; i < 8; ++i) {
        uint32_t bits = 0;
        for (int group = 0; group < E::kLanes / 8; ++group) {
          bits |= static_cast<uint32_t>((bytes[group] >> (8 * i)) & 0xffU) << (8 * group);
        }
        visible[key - begin + i] = bits;
      }
    }
  }
  for (; key < end; ++key) {
    uint32_t bits = 0;
    for (int lane = 0; lane < E::kLanes; ++lane) {
      bits |= static_cast<uint32_t>(panel.mask_row[lane][key * key_stride] != 0) << lane;
    }
    visible[key - begin] = bits;
  }
}

// bias[key - begin][lane], for keys [begin, end) of the head, from elements of type T.
template <class E, class T>
FASTATTN_NOINLINE void read_bias(const Panel<E>& panel, int64_t key_stride, int64_t begin, int64_t end,
                                 typename E::Scalar* bias) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  const auto value = [&](int lane, int64_t key) FASTATTN_LAMBDA_INLINE {
    return static_cast<Scalar>(to_scalar(reinterpret_cast<const T*>(panel.bias_row[lane])[key * key_stride]));
  };
  if (panel.bias_shared) {
    for (int64_t key = begin; key < end; ++key) {
      const auto x = V::set1(value(0, key));
      for (int v = 0; v < E::kVectors; ++v) {
        V::store(bias + (key - begin) * E::kLanes + v * E::kWidth, x);
      }
    }
    return;
  }
  if (key_stride != 1) {
    for (int64_t key = begin; key < end; ++key) {
      for (int lane = 0; lane < E::kLanes; ++lane) {
        bias[(key - begin) * E::kLanes + lane] = value(lane, key);
      }
    }
    return;
  }
  for (int v = 0; v < E::kVectors; ++v) {
    transpose_rows<E>(bias + v * E::kWidth, end - begin, [&](int i, int64_t key, int count) FASTATTN_LAMBDA_INLINE {
      const T* row = reinterpret_cast<const T*>(panel.bias_row[v * E::kWidth + i]) + begin + key;
      return count == E::kWidth ? V::load(row) : V::load_partial(row, count);
    });
  }
}

// What a bias of -inf hides, merged into `visible`.
template <class E>
inline void hide_by_bias(const typename E::Scalar* bias, int64_t keys, uint32_t* visible) {
  using V = typename E::V;
  const auto lowest = V::set1(-static_cast<typename E::Scalar>(__builtin_inf()));
  for (int64_t key = 0; key < keys; ++key) {
    uint32_t hidden = 0;
    for (int v = 0; v < E::kVectors; ++v) {
      const auto x = V::load(bias + key * E::kLanes + v * E::kWidth);
      hidden |= V::bits(V::less_equal(x, lowest)) << (v * E::kWidth);
    }
    visible[key] &= ~hidden;
  }
}

// Fills both tables, indexed by the key within the block, for keys [begin, end) of the head.
template <class E>
inline DenseBlock<E> read_dense(const Panel<E>& panel, const AttentionParams& p, int64_t block, int64_t begin,
                                int64_t end, uint32_t* visible, typename E::Scalar* bias) {
  DenseBlock<E> dense{};
  if (p.mask == nullptr && p.bias == nullptr) {
    return dense;
  }
  uint32_t* seen = visible + (begin - block);
  dense.visible = visible;
  if (p.mask != nullptr) {
    read_mask<E>(panel, p.mask_strides[3], begin, end, seen);
  } else {
    memset(seen, 0xff, static_cast<size_t>(end - begin) * sizeof *seen);
  }
  if (p.bias != nullptr) {
    auto* to = bias + (begin - block) * E::kLanes;
    if (p.bias_dtype == DType::float32 && sizeof(typename E::Source) != sizeof(float)) {
      read_bias<E, float>(panel, p.bias_strides[3], begin, end, to);
    } else {
      read_bias<E, typename E::Source>(panel, p.bias_strides[3], begin, end, to);
    }
    hide_by_bias<E>(to, end - begin, seen);
    dense.bias = bias;
  }
  // The last tile may reach past the last key.
  for (int64_t key = end; key < round_up(end - block, E::kKeys) + block; ++key) {
    visible[key - block] = 0;
    for (int lane = 0; p.bias != nullptr && lane < E::kLanes; ++lane) {
      bias[(key - block) * E::kLanes + lane] = 0;
    }
  }
  return dense;
}

}  // namespace
}  // namespace fastattn
