// Sequences that begin alike share pages. A chunk of keys that lies in the same pages for several sequences is read by
// one task for all of them: each has panels of its own, so its bits are those that it has alone.
#pragma once

#include "algorithm/operands.h"

namespace fastattn {
namespace {

// Sequences that one task reads a chunk for, at most: their queries and sums stay in the second-level cache beside it.
constexpr int kMaxMembers = 8;

// Whether keys [begin, end) of sequences a and b exist and lie in the same pages.
inline bool same_pages(const AttentionParams& p, int64_t a, int64_t b, int64_t begin, int64_t end) {
  if (existing_keys(p, a) < end || existing_keys(p, b) < end) {
    return false;
  }
  const int64_t* one = p.block_table + a * p.block_table_stride;
  const int64_t* other = p.block_table + b * p.block_table_stride;
  const int64_t first = begin / p.page_size;
  const int64_t last = (end + p.page_size - 1) / p.page_size;
  return memcmp(one + first, other + first, static_cast<size_t>(last - first) * sizeof *one) == 0;
}

// Whether the first `keys` keys of two sequences lie in the same pages.
inline bool shares_pages(const AttentionParams& p, int64_t keys) {
  for (int64_t b = 1; p.block_table != nullptr && b < p.batch; ++b) {
    for (int64_t a = 0; a < b; ++a) {
      if (same_pages(p, a, b, 0, keys)) {
        return true;
      }
    }
  }
  return false;
}

// Of every chunk: which sequences a task reads it for, as lists that a leader starts.
struct SharedChunks {
  int32_t* next;    // [chunks][batch]: the sequence after this one in its list, -1 for none
  uint8_t* follow;  // [chunks][batch]: whether the sequence is on the list of another
  int64_t batch;

  static int64_t bytes(int64_t chunks, int64_t batch) { return batch * (5 * chunks + 4 * 4); }
  bool follows(int64_t chunk, int64_t sequence) const { return follow[chunk * batch + sequence] != 0; }

  // The sequences on the list of `leader`, itself first; returns how many.
  int members(int64_t chunk, int64_t leader, int64_t* sequences) const {
    int count = 0;
    for (int64_t b = leader; b >= 0; b = next[chunk * batch + b]) {
      sequences[count++] = b;
    }
    return count;
  }
};

// Finds them in `memory`. Chunks of sequences that have parted are not compared again: what is shared is a beginning.
inline SharedChunks find_shared_chunks(const AttentionParams& p, int64_t chunks, int64_t chunk_keys, char* memory) {
  const int64_t batch = p.batch;
  auto* next = reinterpret_cast<int32_t*>(memory);
  int32_t* like = next + chunks * batch;  // the first sequence with the same pages so far
  int32_t* last = like + batch;           // of the list that is being filled, by that sequence
  int32_t* count = last + batch;
  int32_t* before = count + batch;
  auto* follow = reinterpret_cast<uint8_t*>(before + batch);
  memset(before, 0, static_cast<size_t>(batch) * sizeof *before);  // at the start all are alike
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t b = 0; b < batch; ++b) {
      like[b] = static_cast<int32_t>(b);
      for (int64_t a = before[b]; a < b && like[b] == b; ++a) {
        if (before[a] == before[b] && like[a] == a &&
            same_pages(p, a, b, chunk * chunk_keys, (chunk + 1) * chunk_keys)) {
          like[b] = static_cast<int32_t>(a);
        }
      }
      const int32_t first = like[b];
      const bool joins = first != b && count[first] < kMaxMembers;
      follow[chunk * batch + b] = joins ? 1 : 0;
      next[chunk * batch + b] = -1;
      if (joins) {
        next[chunk * batch + last[first]] = static_cast<int32_t>(b);
      }
      count[first] = joins ? count[first] + 1 : 1;
      last[first] = static_cast<int32_t>(b);
    }
    memcpy(before, like, static_cast<size_t>(batch) * sizeof *before);
  }
  return {next, follow, batch};
}

}  // namespace
}  // namespace fastattn
