// Insight: what each query looks at, in memory that grows with queries plus keys. The forward runs as it is on an
// engine whose panels note down what goes by (observe.h); once a panel's normalisers are known, its probabilities are
// gone over again and added up over its rows, a number a key.
//
// Such sums go on from panel to panel, so a task is a fixed group of a head's rows, which one thread goes through in
// order; the groups' sums are then added in order. Groups follow from the number of queries alone, and so do bits.
#pragma once

#include "algorithm/forward.h"

namespace fastattn {
namespace {

// Groups of rows a head, at most: each holds a number a key. Eight keep as many threads busy on one head.
constexpr int64_t kInsightGroups = 8;
// Panels that go through the keys side by side. Each keeps 128 bytes a key; see decision 17.
constexpr int64_t kInsightPanels = 1;
// Keys up to which a panel keeps its probabilities; beyond, it multiplies queries and keys a second time.
constexpr int64_t kKeptKeys = int64_t{64} << 10;

template <class E>
struct InsightPlan {
  ForwardPlan<E> forward;
  int64_t top_k;   // of the keys there are
  int64_t rounds;  // of up to forward.panels panels each, that a query head's rows fall into
  int64_t groups;  // that these are dealt to
  bool keeps_all;
  int64_t room_keys;   // for what panels keep of keys, whole blocks
  int64_t mass_keys;   // of a group's sums
  int64_t part_bytes;  // of a group's sums: [mass_keys] of E::Scalar, then [edge_count + 1] doubles
  // byte offsets of a thread's scratch
  int64_t candidates_at, shifts_at, probs_at, first_at, panel_bytes, own_at;
};

template <class E>
struct InsightCall {
  const InsightParams& p;
  const InsightPlan<E>& plan;
  ForwardCall<E> forward;
  char* parts;  // [wave][spans][groups][part_bytes]
};

// Keys that the rows of a panel may see between the first and the last of them, at most.
template <class E>
inline int64_t seen_extent(const AttentionParams& p) {
  const bool windowed = p.window_left < kUnbounded && p.window_right < kUnbounded;
  return windowed ? min64(p.seqlen_k, p.window_left + p.window_right + E::kLanes) : p.seqlen_k;
}

template <class E>
inline void plan_observations(InsightPlan<E>& plan, const AttentionParams& p) {
  using Scalar = typename E::Scalar;
  constexpr auto kScalar = static_cast<int64_t>(sizeof(Scalar));
  const int64_t extent = seen_extent<E>(p);
  plan.keeps_all = extent <= kKeptKeys;
  plan.room_keys = round_up(extent, E::kBlockKeys) + E::kBlockKeys;  // both ends may lie within a block
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const int64_t start = bytes;
    bytes += round_up(size, kScratchAlign);
    return start;
  };
  plan.candidates_at = take(E::kLanes * candidate_room(plan.top_k) * static_cast<int64_t>(sizeof(ScoredKey)));
  plan.shifts_at = take(plan.room_keys / E::kBlockKeys * E::kLanes * kScalar);
  plan.probs_at = take((plan.keeps_all ? plan.room_keys : E::kBlockKeys) * E::kLanes * kScalar);
  plan.panel_bytes = bytes;
  const int64_t first_bytes = (E::kBlockKeys + Observation<E>::kTiles) * E::kLanes * kScalar;
  plan.own_at = plan.forward.thread_bytes;
  plan.first_at = plan.own_at + plan.forward.panels * plan.panel_bytes;
  plan.forward.thread_bytes = round_up(plan.first_at + first_bytes, 4096);
}

template <class E>
inline InsightPlan<E> plan_insight(const InsightParams& p) {
  const AttentionParams& forward = p.forward;
  InsightPlan<E> plan{};
  plan.forward = start_plan<E>(forward);
  ForwardPlan<E>& tasks = plan.forward;
  tasks.layout.pack_value &= forward.out != nullptr;
  tasks.spans = forward.query_heads / forward.kv_heads;
  tasks.span_rows = forward.seqlen_q;
  tasks.span_panels = (tasks.span_rows + E::kLanes - 1) / E::kLanes;
  tasks.panels = static_cast<int>(clamp64(tasks.span_panels / kInsightGroups, 1, kInsightPanels));
  tasks.chunks = tasks.task_chunks = tasks.members = 1;
  plan.rounds = (tasks.span_panels + tasks.panels - 1) / tasks.panels;
  plan.groups = tasks.span_tasks = min64(plan.rounds, kInsightGroups);
  plan.top_k = min64(p.top_k, max64(forward.seqlen_k, 1));
  plan.mass_keys = round_up(forward.seqlen_k, E::kBlockKeys);
  plan.part_bytes = round_up(plan.mass_keys * static_cast<int64_t>(sizeof(typename E::Scalar)) +
                                 (p.edge_count + 1) * static_cast<int64_t>(sizeof(double)),
                             kScratchAlign);
  finish_plan<E>(tasks, forward, tasks.spans * plan.groups * plan.part_bytes);
  plan_observations<E>(plan, forward);
  return plan;
}

// A group's sums.
template <class E>
struct InsightPart {
  typename E::Scalar* mass;
  double* distances;

  static InsightPart at(const InsightCall<E>& call, int64_t local_head, int64_t span, int64_t group) {
    const InsightPlan<E>& plan = call.plan;
    const int64_t index = (local_head * plan.forward.spans + span) * plan.groups + group;
    auto* mass = reinterpret_cast<typename E::Scalar*>(call.parts + index * plan.part_bytes);
    return {mass, reinterpret_cast<double*>(mass + plan.mass_keys)};
  }
};

template <class E>
inline void place_observations(const InsightCall<E>& call, const ForwardTask<E>& task) {
  using Scalar = typename E::Scalar;
  const InsightPlan<E>& plan = call.plan;
  for (int i = 0; i < task.panels; ++i) {
    Panel<E>& panel = *task.panel(i);
    char* own = task.scratch + plan.own_at + i * plan.panel_bytes;
    panel.top_k = plan.top_k;
    panel.candidates = reinterpret_cast<ScoredKey*>(own + plan.candidates_at);
    panel.shifts = reinterpret_cast<Scalar*>(own + plan.shifts_at);
    panel.probs = reinterpret_cast<Scalar*>(own + plan.probs_at);
    panel.origin = round_down(panel.first_min, E::kBlockKeys);
    panel.keeps_all = plan.keeps_all;
    panel.first_scores = reinterpret_cast<Scalar*>(task.scratch + plan.first_at);
    panel.first_peaks = panel.first_scores + E::kBlockKeys * E::kLanes;
  }
}

// totals[key] = the sum over the lanes of scale * probs[key][lane], for `count` keys.
template <class E, int kActive>
FASTATTN_NOINLINE void weigh_keys(const typename E::Scalar* probs, const typename E::Scalar* scale, int64_t count,
                                  typename E::Scalar* totals) {
  using V = typename E::V;
  typename E::Reg factor[kActive];
  for (int v = 0; v < kActive; ++v) {
    factor[v] = V::load(scale + v * E::kWidth);
  }
  for (int64_t key = 0; key < count; key += 8) {
    typename E::Reg sums[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      sums[r] = V::zero();
      if (key + r < count) {
        const auto* row = probs + (key + r) * E::kLanes;
#pragma GCC unroll 4
        for (int v = 0; v < kActive; ++v) {
          sums[r] = V::fma(V::load(row + v * E::kWidth), factor[v], sums[r]);
        }
      }
    }
    V::sum_lanes(sums, totals + key);
  }
}

// The same of lanes whose scale is no number: those keys alone that the lane sees.
template <class E>
FASTATTN_NOINLINE void weigh_broken(const typename E::Scalar* probs, double scale, int64_t count,
                                    typename E::Scalar* totals) {
  for (int64_t key = 0; key < count; ++key) {
    if (probs[key * E::kLanes] != 0) {
      totals[key] += static_cast<typename E::Scalar>(probs[key * E::kLanes] * scale);
    }
  }
}

inline int64_t bucket_of(const InsightParams& p, int64_t distance) {
  int64_t low = 0;
  int64_t high = p.edge_count;  // how many edges are at most the distance is in [low, high]
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    (p.edges[middle] <= distance ? low : high) = p.edges[middle] <= distance ? middle + 1 : middle;
  }
  return low;
}

// Adds what `count` keys from `begin` on have received to the buckets of their distances. Eight keys and the rows of a
// panel are mostly in one bucket.
template <class E>
FASTATTN_NOINLINE void add_distances(const InsightParams& p, const Panel<E>& panel, int64_t begin, int64_t count,
                                     const typename E::Scalar* probs, const typename E::Scalar* scale,
                                     const typename E::Scalar* totals, double* distances) {
  for (int64_t key = 0; key < count; key += 8) {
    const int64_t stop = min64(key + 8, count);
    const int64_t nearest = bucket_of(p, panel.position[0] - (begin + stop - 1));
    if (nearest == bucket_of(p, panel.position[panel.live - 1] - (begin + key))) {
      for (int64_t i = key; i < stop; ++i) {
        distances[nearest] += static_cast<double>(totals[i]);
      }
      continue;
    }
    for (int64_t i = key; i < stop; ++i) {
      for (int lane = 0; lane < panel.live; ++lane) {
        const auto prob = static_cast<double>(probs[i * E::kLanes + lane]);
        if (prob != 0) {
          distances[bucket_of(p, panel.position[lane] - (begin + i))] += prob * static_cast<double>(scale[lane]);
        }
      }
    }
  }
}

// What multiplies a block's probabilities to make them weights: the normaliser's inverse, and how far the shift has
// come since.
template <class E>
inline void block_scales(const ForwardTask<E>& task, const Panel<E>& panel, int64_t block,
                         const Normaliser* normalisers, typename E::Scalar* scale) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  const auto to_log2 = V::set1(static_cast<Scalar>(task.plan.rules.to_log2()));
  for (int v = 0; v < E::kVectors; ++v) {
    const auto then = V::load((panel.keeps_all ? panel.block_shifts(block) : panel.shift) + v * E::kWidth);
    const auto rise = V::mul(V::sub(then, V::load(panel.shift + v * E::kWidth)), to_log2);
    V::store(scale + v * E::kWidth, exp2<V>(rise));
  }
  for (int lane = 0; lane < E::kLanes; ++lane) {
    scale[lane] = lane < panel.live ? static_cast<Scalar>(scale[lane] * normalisers[lane].inverse) : 0;
  }
}

// Adds up the weights of a panel over its rows.
template <class E>
FASTATTN_NOINLINE void add_mass(const InsightCall<E>& call, const ForwardTask<E>& task, TileContext<E>& context,
                                const Normaliser* normalisers, const InsightPart<E>& part) {
  using Scalar = typename E::Scalar;
  Panel<E>& panel = context.panel;
  for (int lane = 0; lane < E::kLanes; ++lane) {  // where scores are computed again, under the shifts as they are
    panel.limit[lane] = panel.threshold[lane] = static_cast<Scalar>(__builtin_inf());
  }
  alignas(64) Scalar scale[E::kLanes];
  alignas(64) Scalar totals[E::kBlockKeys];
  for (int64_t block = round_down(panel.first_min, E::kBlockKeys); block < panel.last_max; block += E::kBlockKeys) {
    int64_t begin;
    int64_t end;
    if (!seen_of_block<E>(task, panel, block, &begin, &end)) {
      continue;
    }
    if (!panel.keeps_all) {
      prepare_block<E>(task, context, block, &begin, &end);
      score_block<E>(task, context, block_view<E>(task, block), begin, end);
    }
    block_scales<E>(task, panel, block, normalisers, scale);
    const Scalar* probs = panel.block_probs(block) + (begin - block) * E::kLanes;
    alignas(64) Scalar sound[E::kLanes];
    bool broken = false;
    for (int lane = 0; lane < E::kLanes; ++lane) {
      const bool finite = scale[lane] - scale[lane] == 0;
      sound[lane] = finite ? scale[lane] : 0;
      broken |= !finite;
    }
    (panel.live > E::kWidth ? weigh_keys<E, E::kVectors> : weigh_keys<E, 1>)(probs, sound, end - begin, totals);
    for (int lane = 0; broken && lane < panel.live; ++lane) {
      if (scale[lane] - scale[lane] != 0) {
        weigh_broken<E>(probs + lane, scale[lane], end - begin, totals);
      }
    }
    for (int64_t key = 0; key < end - begin; ++key) {
      part.mass[begin + key] += totals[key];
    }
    if (call.p.distance_mass != nullptr) {
      add_distances<E>(call.p, panel, begin, end - begin, probs, scale, totals, part.distances);
    }
  }
}

// The entropy of a row, -sum p log(p) over its keys and, if there is one, its sink.
template <class E>
inline double row_entropy(const Panel<E>& panel, const AttentionParams& p, const ScoreRules<E>& rules, int lane) {
  const auto sum = static_cast<double>(panel.sum[lane]);
  if (sum == 0) {
    return 0;
  }
  double total = sum;
  double logs = static_cast<double>(panel.log_sum[lane]) * kLn2;
  if (p.sinks != nullptr) {
    const double shift = static_cast<double>(panel.shift[lane]) * rules.to_natural() + panel.beyond[lane];
    const double sink = p.sinks[panel.head[lane]] - shift;
    const double share = ::exp(sink);
    total += share;
    logs += share == 0 ? 0 : share * sink;
  }
  if (total > __DBL_MAX__) {  // the sink has all
    return 0;
  }
  const double entropy = ::log(total) - logs / total;
  return entropy < 0 ? 0 : entropy;
}

// Keys, weights and entropy of a panel's rows.
template <class E>
FASTATTN_NOINLINE void write_insight_rows(const InsightParams& p, const ScoreRules<E>& rules, Panel<E>& panel,
                                          const Normaliser* normalisers) {
  using Scalar = typename E::Scalar;
  using Result = Scalar;
  for (int lane = 0; lane < panel.live; ++lane) {
    const int64_t row = (panel.batch * p.forward.query_heads + panel.head[lane]) * p.forward.seqlen_q + panel.row[lane];
    static_cast<Result*>(p.entropy)[row] = static_cast<Result>(row_entropy<E>(panel, p.forward, rules, lane));
    ScoredKey* candidates = panel.candidates + lane * candidate_room(panel.top_k);
    int64_t count = panel.count[lane];
    if (count > panel.top_k) {
      keep_best(candidates, count, panel.top_k);
      count = panel.top_k;
    }
    sort_best(candidates, count);
    int64_t* keys = p.keys + row * p.top_k;
    auto* weights = static_cast<Result*>(p.weights) + row * p.top_k;
    for (int64_t i = 0; i < p.top_k; ++i) {
      keys[i] = i < count ? candidates[i].key : -1;
      weights[i] = 0;
      if (i < count) {
        auto score = static_cast<Scalar>(candidates[i].score);
        score = rules.natural ? score : score * rules.factor;
        const double above = static_cast<double>(score) - static_cast<double>(panel.shift[lane]);
        weights[i] = static_cast<Result>(::exp2(above * rules.to_log2()) * normalisers[lane].inverse);
      }
    }
  }
}

// A group of a head's rows.
template <class E>
void insight_task(void* opaque, int64_t index, int thread) {
  const auto& call = *static_cast<const InsightCall<E>*>(opaque);
  const InsightPlan<E>& plan = call.plan;
  const int64_t local_head = index / plan.forward.head_tasks;
  const int64_t span = index % plan.forward.head_tasks / plan.groups;
  const int64_t group = index % plan.groups;
  const InsightPart<E> part = InsightPart<E>::at(call, local_head, span, group);
  memset(part.mass, 0, static_cast<size_t>(plan.part_bytes));
  const int64_t round_rows = int64_t{plan.forward.panels} * E::kLanes;
  const typename E::V::FlushDenormals flush;
  for (int64_t sweep = 0;; ++sweep) {
    // There and back, so that the causal rule leaves all groups with as much to do.
    const int64_t round = sweep * plan.groups + (sweep % 2 == 0 ? group : plan.groups - 1 - group);
    if (round >= plan.rounds) {
      return;
    }
    const int64_t first = span * plan.forward.span_rows;
    const ForwardTask<E> task =
        task_of_rows<E>(call.forward, local_head, first + round * round_rows,
                        first + min64((round + 1) * round_rows, plan.forward.span_rows), thread);
    task.finite().block = -1;
    place_panels<E>(call.forward, task);
    place_observations<E>(call, task);
    attend<E>(task, 0, INT64_MAX);
    for (int i = 0; i < task.panels; ++i) {
      Normaliser normalisers[E::kLanes];
      Panel<E>& panel = *task.panel(i);
      finish_rows<E>(panel, task.p, task.plan.rules, task.rows.batch, normalisers);
      write_insight_rows<E>(call.p, task.plan.rules, panel, normalisers);
      TileContext<E> context = tile_context<E>(task, i);
      add_mass<E>(call, task, context, normalisers, part);
    }
  }
}

// Adds the groups' sums of one query head.
template <class E>
void gather_mass(void* opaque, int64_t index, int /*thread*/) {
  using Result = typename E::Scalar;
  const auto& call = *static_cast<const InsightCall<E>*>(opaque);
  const InsightPlan<E>& plan = call.plan;
  const AttentionParams& p = call.p.forward;
  const int64_t local_head = index / plan.forward.spans;
  const int64_t span = index % plan.forward.spans;
  const int64_t head = (call.forward.first_head + local_head) * plan.forward.spans + span;  // over batch and heads
  const auto part = [&](int64_t group) { return InsightPart<E>::at(call, local_head, span, group); };
  for (int64_t key = 0; key < p.seqlen_k; ++key) {
    double sum = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
      sum += static_cast<double>(part(group).mass[key]);
    }
    static_cast<Result*>(call.p.key_mass)[head * p.seqlen_k + key] = static_cast<Result>(sum);
  }
  const int64_t buckets = call.p.distance_mass == nullptr ? 0 : call.p.edge_count + 1;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    double sum = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
      sum += part(group).distances[bucket];
    }
    static_cast<Result*>(call.p.distance_mass)[head * buckets + bucket] = static_cast<Result>(sum);
  }
}

template <class Engine>
void insight(const InsightParams& p) {
  using E = Observed<Engine>;
  const AttentionParams& forward = p.forward;
  if (forward.batch == 0 || forward.query_heads == 0 || forward.seqlen_q == 0) {
    return;
  }
  const InsightPlan<E> plan = plan_insight<E>(p);
  const ForwardPlan<E>& tasks = plan.forward;
  const int64_t thread_bytes = tasks.threads * tasks.thread_bytes;
  const int64_t packed_bytes = tasks.wave * tasks.head_bytes;
  const int64_t tables = tasks.dense_batches * tasks.dense_spans * tasks.span_panels;
  const int64_t dense_bytes = round_up(tables * tasks.dense_bytes, kScratchAlign);
  const int64_t part_bytes = tasks.wave * tasks.spans * plan.groups * plan.part_bytes;
  const Workspace workspace(static_cast<size_t>(thread_bytes + packed_bytes + dense_bytes + part_bytes));
  char* packed = workspace.data() + thread_bytes;
  char* dense = packed + packed_bytes;
  InsightCall<E> call{
      p, plan, {forward, tasks, workspace.data(), packed, dense, nullptr, nullptr, 0, {}}, dense + dense_bytes};
  if (tasks.dense_bytes > 0) {
    parallel_for(tables, tasks.threads, dense_task<E>, &call.forward, forward.num_threads);
  }
  const int64_t heads = forward.batch * forward.kv_heads;
  for (int64_t head = 0; head < heads; head += tasks.wave) {
    const int64_t wave = min64(tasks.wave, heads - head);
    call.forward.first_head = head;
    if (tasks.head_bytes > 0) {
      const int64_t blocks = (tasks.keys + E::kBlockKeys - 1) / E::kBlockKeys;
      parallel_for(wave * blocks, tasks.threads, pack_task<E>, &call.forward, forward.num_threads);
    }
    parallel_for(wave * tasks.head_tasks, tasks.threads, insight_task<E>, &call, forward.num_threads);
    parallel_for(wave * tasks.spans, tasks.threads, gather_mass<E>, &call, forward.num_threads);
  }
}

}  // namespace
}  // namespace fastattn
