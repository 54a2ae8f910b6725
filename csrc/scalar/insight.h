// What each query looks at, as obvious loops in double precision: one head a task, a row after the other.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "scalar/rows.h"
#include "top_keys.h"
#include "workspace.h"

namespace fastattn {
namespace {

// What one head needs room for, a number or two a key.
struct InsightRoom {
  double* weights;
  double* mass;
  ScoredKey* seen;  // the keys that the row sees, with their scores
  double* buckets;

  static int64_t bytes(const InsightParams& p) {
    return p.forward.seqlen_k * static_cast<int64_t>(2 * sizeof(double) + sizeof(ScoredKey)) +
           (p.edge_count + 1) * static_cast<int64_t>(sizeof(double));
  }
  static InsightRoom at(const InsightParams& p, char* memory) {
    const int64_t keys = p.forward.seqlen_k;
    auto* seen = reinterpret_cast<ScoredKey*>(memory);
    auto* weights = reinterpret_cast<double*>(seen + keys);
    return {weights, weights + keys, seen, weights + 2 * keys};
  }
};

// What one row sees, and its softmax.
struct SeenKeys {
  int64_t count;
  double peak;
  double inverse;  // of the normaliser
  double entropy;
};

// Fills room.seen, and room.weights for all keys.
template <class T>
SeenKeys look(const AttentionParams& p, const Row& r, const InsightRoom& room) {
  SeenKeys seen{0, -kInfinity, 0, 0};
  for (int64_t key = 0; key < p.seqlen_k; ++key) {
    room.weights[key] = 0;
    if (visible<T>(p, r, key)) {
      const double s = score<T>(p, r, key);
      room.seen[seen.count] = {s, key};
      seen.count += s != -kInfinity ? 1 : 0;
      seen.peak = s > seen.peak ? s : seen.peak;
    }
  }
  if (seen.count == 0) {
    return seen;
  }
  const double peak = seen.peak == -kInfinity ? 0 : seen.peak;  // NaN alone
  double total = 0;
  for (int64_t i = 0; i < seen.count; ++i) {
    total += std::exp(room.seen[i].score - peak);
  }
  const double sink = p.sinks == nullptr ? -kInfinity : p.sinks[r.head];
  const double share = std::exp(sink - peak);
  seen.inverse = 1 / (total + share);
  double logs = share == 0 || share == kInfinity ? 0 : share * (sink - peak);
  for (int64_t i = 0; i < seen.count; ++i) {
    const double above = room.seen[i].score - peak;
    const double prob = std::exp(above);
    room.weights[room.seen[i].key] = prob * seen.inverse;
    logs += prob == 0 ? 0 : prob * above;
  }
  seen.entropy = share == kInfinity ? 0 : std::log(total + share) - logs * seen.inverse;
  return seen;
}

template <class Result>
void write_top_keys(const InsightParams& p, int64_t row, SeenKeys seen, const InsightRoom& room) {
  int64_t count = 0;
  for (int64_t i = 0; i < seen.count; ++i) {  // a NaN is nobody's better
    if (room.seen[i].score == room.seen[i].score) {
      room.seen[count++] = room.seen[i];
    }
  }
  count = sort_best(room.seen, count, p.top_k);
  for (int64_t i = 0; i < p.top_k; ++i) {
    const int64_t key = i < count ? room.seen[i].key : -1;
    p.keys[row * p.top_k + i] = key;
    static_cast<Result*>(p.weights)[row * p.top_k + i] = static_cast<Result>(key < 0 ? 0 : room.weights[key]);
  }
}

template <class T>
void write_output(const AttentionParams& p, const Row& r, int64_t count, const InsightRoom& room) {
  for (int64_t d = 0; d < p.value_dim; ++d) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t key = room.seen[i].key;
      sum += room.weights[key] * load_cached<T>(p, p.value, value_row(p, r, key), p.value_strides[3], d);
    }
    store<T>(p.out, offset(p.out_strides, r, d), sum);
  }
}

struct InsightLoop {
  const InsightParams& p;
  char* rooms;
  int64_t room_bytes;
};

template <class T, class Result>
void insight_head(void* context, int64_t index, int thread) {
  const InsightLoop& loop = *static_cast<const InsightLoop*>(context);
  const InsightParams& p = loop.p;
  const AttentionParams& forward = p.forward;
  const InsightRoom room = InsightRoom::at(p, loop.rooms + thread * loop.room_bytes);
  const int64_t buckets = p.distance_mass == nullptr ? 0 : p.edge_count + 1;
  std::fill(room.mass, room.mass + forward.seqlen_k, 0.0);
  std::fill(room.buckets, room.buckets + buckets, 0.0);
  for (int64_t i = 0; i < forward.seqlen_q; ++i) {
    const int64_t row = index * forward.seqlen_q + i;
    const Row r = row_at(forward, row);
    const SeenKeys seen = look<T>(forward, r, room);
    if (forward.out != nullptr) {
      write_output<T>(forward, r, seen.count, room);
    }
    static_cast<Result*>(p.entropy)[row] = static_cast<Result>(seen.entropy < 0 ? 0 : seen.entropy);
    for (int64_t n = 0; n < seen.count; ++n) {
      const int64_t key = room.seen[n].key;
      room.mass[key] += room.weights[key];
      if (buckets > 0) {
        const int64_t* edge = std::upper_bound(p.edges, p.edges + p.edge_count, r.position - key);
        room.buckets[edge - p.edges] += room.weights[key];
      }
    }
    write_top_keys<Result>(p, row, seen, room);
  }
  std::copy(room.mass, room.mass + forward.seqlen_k, static_cast<Result*>(p.key_mass) + index * forward.seqlen_k);
  for (int64_t n = 0; n < buckets; ++n) {
    static_cast<Result*>(p.distance_mass)[index * buckets + n] = static_cast<Result>(room.buckets[n]);
  }
}

template <class T, class Result>
void insight(const InsightParams& p) {
  const int64_t heads = p.forward.seqlen_q == 0 ? 0 : p.forward.batch * p.forward.query_heads;
  const int threads = effective_threads(heads, p.forward.num_threads);
  const int64_t room_bytes = (InsightRoom::bytes(p) + 63) / 64 * 64;
  const Workspace rooms(static_cast<size_t>(threads * room_bytes));
  InsightLoop loop{p, rooms.data(), room_bytes};
  parallel_for(heads, threads, insight_head<T, Result>, &loop, p.forward.num_threads);
}

}  // namespace
}  // namespace fastattn
