// Rows of mask bytes turned into bits, a key's lanes side by side: with plain integers, eight keys at a time.
#pragma once

#include <cstdint>
#include <cstring>

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

struct MaskBits {
  static constexpr int kKeys = 8;

  // visible[i] bit `lane` = whether byte rows[lane][key + i] is not 0, for i < count <= kKeys, and 0 for the others.
  template <int kLanes>
  static void read(const uint8_t* const* rows, int64_t key, int64_t count, uint32_t* visible) {
    uint64_t bytes[kLanes / 8];
    for (int group = 0; group < kLanes / 8; ++group) {
      uint64_t square = 0;
      for (int i = 0; i < 8; ++i) {
        uint64_t eight = 0;
        memcpy(&eight, rows[group * 8 + i] + key, count == kKeys ? sizeof eight : static_cast<size_t>(count));
        square |= pack_bytes(eight) << (8 * i);
      }
      bytes[group] = transpose_bits(square);
    }
    for (int i = 0; i < kKeys; ++i) {
      uint32_t bits = 0;
      for (int group = 0; group < kLanes / 8; ++group) {
        bits |= static_cast<uint32_t>((bytes[group] >> (8 * i)) & 0xffU) << (8 * group);
      }
      visible[i] = bits;
    }
  }
};

}  // namespace
}  // namespace fastattn
