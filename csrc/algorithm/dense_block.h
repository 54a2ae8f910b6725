// The dense arguments, mask and bias, over one panel and key block: transposed so that lanes are lanes, with what they
// hide gathered as bits, so that the score tiles read them like anything else. So is what segments hide whose keys do
// not stand side by side.
#pragma once

#include "algorithm/panel.h"
#include "algorithm/tile_context.h"

namespace fastattn {
namespace {

// visible[key - block] bit `lane`, for keys [begin, end) of the head.
template <class E>
FASTATTN_NOINLINE void read_mask(const Panel<E>& panel, int64_t key_stride, int64_t block, int64_t begin, int64_t end,
                                 uint32_t* visible) {
  if (panel.mask_shared) {
    for (int64_t key = begin; key < end; ++key) {
      visible[key - block] = panel.mask_row[0][key * key_stride] != 0 ? kAllLanes<E> : 0;
    }
    return;
  }
  if constexpr (E::kLanes % 8 == 0) {
    using Reader = typename E::V::MaskReader;
    static_assert(E::kBlockKeys % Reader::kKeys == 0, "a step must not reach past the table");
    if (key_stride == 1) {
      for (int64_t key = block + round_down(begin - block, Reader::kKeys); key < end; key += Reader::kKeys) {
        Reader::template read<E::kLanes>(panel.mask_row, key, min64(Reader::kKeys, end - key), visible + (key - block));
      }
      return;
    }
  }
  for (int64_t key = begin; key < end; ++key) {
    uint32_t bits = 0;
    for (int lane = 0; lane < E::kLanes; ++lane) {
      bits |= static_cast<uint32_t>(panel.mask_row[lane][key * key_stride] != 0) << lane;
    }
    visible[key - block] = bits;
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
FASTATTN_NOINLINE void hide_by_bias(const typename E::Scalar* bias, int64_t keys, uint32_t* visible) {
  using V = typename E::V;
  const auto lowest = V::set1(-static_cast<typename E::Scalar>(__builtin_inf()));
  auto least = V::zero();
  for (int64_t i = 0; i < keys * E::kLanes; i += E::kWidth) {
    least = V::min(V::load(bias + i), least);  // a NaN is passed over
  }
  if (!V::any(V::less_equal(least, lowest))) {
    return;
  }
  for (int64_t key = 0; key < keys; ++key) {
    uint32_t hidden = 0;
    for (int v = 0; v < E::kVectors; ++v) {
      const auto x = V::load(bias + key * E::kLanes + v * E::kWidth);
      hidden |= V::bits(V::less_equal(x, lowest)) << (v * E::kWidth);
    }
    visible[key] &= ~hidden;
  }
}

// What segments hide of the tile of keys [begin, end), merged into its bits. Most tiles are of one segment, or of none
// of the panel's.
template <class E>
inline void hide_tile_segments(const Panel<E>& panel, const int64_t* segments, int64_t begin, int64_t end,
                               uint32_t* visible) {
  int64_t lowest = segments[begin];
  int64_t highest = lowest;
  for (int64_t key = begin + 1; key < end; ++key) {
    lowest = min64(lowest, segments[key]);
    highest = max64(highest, segments[key]);
  }
  if (highest < panel.segment_min || lowest > panel.segment_max) {
    memset(visible, 0, static_cast<size_t>(end - begin) * sizeof *visible);
    return;
  }
  if (lowest == highest && panel.segment_min == panel.segment_max) {
    return;
  }
  uint32_t bits = 0;
  for (int64_t key = begin; key < end; ++key) {
    if (key == begin || segments[key] != segments[key - 1]) {
      bits = 0;
      for (int lane = 0; lane < E::kLanes; ++lane) {
        bits |= static_cast<uint32_t>(panel.segment[lane] == segments[key]) << lane;
      }
    }
    visible[key - begin] &= bits;
  }
}

// What the bits of the tiles of keys [begin, end) of a block let through.
template <class E>
FASTATTN_NOINLINE void read_sights(const uint32_t* visible, int64_t begin, int64_t end, Sight* sights) {
  for (int64_t key = begin; key < end; key += E::kKeys) {
    uint32_t any = 0;
    uint32_t all = ~0U;
    for (int r = 0; r < E::kKeys; ++r) {
      any |= visible[key + r];
      all &= visible[key + r];
    }
    const bool none = (any & kAllLanes<E>) == 0;
    const bool whole = (all & kAllLanes<E>) == kAllLanes<E>;
    sights[key / E::kKeys] = none ? Sight::none : whole ? Sight::all : Sight::holes;
  }
}

// Whether a call has bits to hide keys by.
inline bool hides_densely(const AttentionParams& p) {
  return p.mask != nullptr || p.bias != nullptr || p.scattered_segments;
}

// Room for the dense arguments of one panel: those of a key block, or of all of them.
template <class E>
struct DenseRoom {
  uint32_t* visible;
  Sight* sights;
  typename E::Scalar* bias;

  // Bytes for `keys` keys, a multiple of kBlockKeys.
  static constexpr int64_t bytes(const AttentionParams& p, int64_t keys) {
    const int64_t bias = p.bias != nullptr ? keys * E::kLanes * static_cast<int64_t>(sizeof(typename E::Scalar)) : 0;
    return hides_densely(p) ? round_up(bias + keys * 4 + keys / E::kKeys, 64) : 0;
  }

  // The part for the key block that starts at `block`.
  static DenseRoom at(char* room, const AttentionParams& p, int64_t keys, int64_t block) {
    auto* bias = reinterpret_cast<typename E::Scalar*>(room);
    auto* visible = reinterpret_cast<uint32_t*>(bias + (p.bias != nullptr ? keys * E::kLanes : 0));
    auto* sights = reinterpret_cast<Sight*>(visible + keys);
    return {visible + block, sights + block / E::kKeys, bias + block * E::kLanes};
  }

  DenseBlock<E> filled(const AttentionParams& p) const { return {visible, sights, p.bias != nullptr ? bias : nullptr}; }
};

// Reads the dense arguments for keys [begin, end) of the head, which lie in the block; `begin` starts a tile.
template <class E>
inline void read_dense(const Panel<E>& panel, const AttentionParams& p, int64_t block, int64_t begin, int64_t end,
                       const DenseRoom<E>& room) {
  const int64_t tiles_end = round_up(end - block, E::kKeys);  // the last tile may reach past the last key
  uint32_t* seen = room.visible + (begin - block);
  if (p.mask != nullptr) {
    read_mask<E>(panel, p.mask_strides[3], block, begin, end, room.visible);
  } else {
    memset(seen, 0xff, static_cast<size_t>(end - begin) * sizeof *seen);
  }
  if (p.bias != nullptr) {
    auto* to = room.bias + (begin - block) * E::kLanes;
    if (p.bias_dtype == DType::float32 && sizeof(typename E::Source) != sizeof(float)) {
      read_bias<E, float>(panel, p.bias_strides[3], begin, end, to);
    } else {
      read_bias<E, typename E::Source>(panel, p.bias_strides[3], begin, end, to);
    }
    hide_by_bias<E>(to, end - begin, seen);
    memset(room.bias + (end - block) * E::kLanes, 0,
           static_cast<size_t>((tiles_end - (end - block)) * E::kLanes) * sizeof(typename E::Scalar));
  }
  for (int64_t key = begin; panel.scattered && key < end; key += E::kKeys) {
    hide_tile_segments<E>(panel, p.key_segments + panel.batch * p.segment_strides[1], key, min64(key + E::kKeys, end),
                          room.visible + (key - block));
  }
  for (int64_t key = end - block; key < tiles_end; ++key) {
    room.visible[key] = 0;
  }
  read_sights<E>(room.visible, begin - block, tiles_end, room.sights);
}

// The dense arguments for such keys: from the table of the panel, or read now.
template <class E>
inline DenseBlock<E> dense_block(const Panel<E>& panel, const AttentionParams& p, int64_t block, int64_t begin,
                                 int64_t end, char* scratch) {
  if (p.mask == nullptr && p.bias == nullptr && !panel.scattered) {
    return {};
  }
  if (panel.dense != nullptr) {
    return DenseRoom<E>::at(panel.dense, p, round_up(p.seqlen_k, E::kBlockKeys), block).filled(p);
  }
  const auto room = DenseRoom<E>::at(scratch, p, E::kBlockKeys, 0);
  read_dense<E>(panel, p, block, begin, end, room);
  return room.filled(p);
}

}  // namespace
}  // namespace fastattn
