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
  int64_t mass_keys;   // of a group's sums
  int64_t part_bytes;  // of a group's sums: [mass_keys] of E::Scalar, then [edge_count + 1] doubles
  // byte offsets of a thread's scratch
  int64_t candidates_at, probs_at, shifts_at, first_at, panel_bytes, own_at;
};

template <class E>
struct InsightCall {
  const InsightParams& p;
  const InsightPlan<E>& plan;
  const ForwardCall<E>& forward;
  char* parts;  // [wave][spans][groups][part_bytes]
};

// Keys that the rows of a panel may see between the first and the last of them, at most.
template <class E>
inline int64_t seen_extent(const AttentionParams& p) {
  const bool windowed = p.window_left < kUnbounded && p.window_right < kUnbounded;
  // Each first: the sum of two bounds may exceed 64 bits.
  const int64_t left = min64(p.window_left, p.seqlen_k);
  const int64_t right = min64(p.window_right, p.seqlen_k);
  return windowed ? min64(p.seqlen_k, left + right + E::kLanes) : p.seqlen_k;
}

template <class E>
inline void plan_observations(InsightPlan<E>& plan, const AttentionParams& p) {
  using Scalar = typename E::Scalar;
  constexpr auto kScalar = static_cast<int64_t>(sizeof(Scalar));
  const int64_t extent = seen_extent<E>(p);
  plan.keeps_all = extent <= kKeptKeys;
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const int64_t start = bytes;
    bytes += round_up(size, kScratchAlign);
    return start;
  };
  plan.candidates_at = take(Candidates<E>::bytes(plan.top_k));
  const int64_t kept = plan.keeps_all ? round_up(extent, E::kBlockKeys) + E::kBlockKeys  // both ends lie within a block
                                      : E::kBlockKeys;
  plan.probs_at = take(kept * E::kLanes * kScalar);
  plan.shifts_at = take(kept / E::kGroupKeys * E::kLanes * kScalar);
  plan.first_at = take((Observation<E>::kFirstKeys + Observation<E>::kFirstGroups) * E::kLanes * kScalar);
  plan.panel_bytes = bytes;
  plan.own_at = plan.forward.thread_bytes;
  plan.forward.thread_bytes = round_up(plan.own_at + plan.forward.panels * plan.panel_bytes, 4096);
}

template <class E>
inline InsightPlan<E> plan_insight(const InsightParams& p) {
  const AttentionParams& forward = p.forward;
  InsightPlan<E> plan{};
  plan.forward = start_plan<E>(forward);
  ForwardPlan<E>& tasks = plan.forward;
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
    panel.place(own + plan.candidates_at, plan.top_k);
    panel.shifts = reinterpret_cast<Scalar*>(own + plan.shifts_at);
    panel.probs = reinterpret_cast<Scalar*>(own + plan.probs_at);
    panel.origin = round_down(panel.first_min, E::kBlockKeys);
    panel.keeps_all = plan.keeps_all;
    panel.first_scores = reinterpret_cast<Scalar*>(own + plan.first_at);
    panel.first_peaks = panel.first_scores + Observation<E>::kFirstKeys * E::kLanes;
  }
}

// What multiplies a group's probabilities to make them weights: the normaliser's inverse, and how far the shift has
// come since. A lane that had seen nothing by then may have had any shift.
template <class E>
FASTATTN_NOINLINE void find_scales(const Panel<E>& panel, const ScoreRules<E>& rules, const typename E::Scalar* shifts,
                                   const typename E::Scalar* inverse, typename E::Scalar* scale) {
  using V = typename E::V;
  const auto to_log2 = V::set1(static_cast<typename E::Scalar>(rules.to_log2()));
  for (int v = 0; v < E::kVectors; ++v) {
    const auto rise = V::sub(V::load(shifts + v * E::kWidth), V::load(panel.shift + v * E::kWidth));
    const auto power = exp2<V>(V::mul(V::min(rise, V::zero()), to_log2));
    V::store(scale + v * E::kWidth, V::mul(power, V::load(inverse + v * E::kWidth)));
  }
}

// Shifts are never NaN.
template <class E>
FASTATTN_INLINE bool shifts_differ(const typename E::Scalar* a, const typename E::Scalar* b) {
  using V = typename E::V;
  bool differ = false;
#pragma GCC unroll 4
  for (int v = 0; v < E::kVectors; ++v) {
    const auto one = V::load(a + v * E::kWidth);
    const auto other = V::load(b + v * E::kWidth);
    differ |= V::any(V::less(one, other)) || V::any(V::less(other, one));
  }
  return differ;
}

// totals[key] = the sum over the lanes of scale * probs[key][lane], for one group of keys.
template <class E, int kActive>
FASTATTN_INLINE void weigh_group(const typename E::Scalar* probs, const typename E::Scalar* scale,
                                 typename E::Scalar* totals) {
  using V = typename E::V;
  static_assert(E::kGroupKeys <= 8);
  typename E::Reg sums[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    sums[r] = V::zero();
    if (r < E::kGroupKeys) {
#pragma GCC unroll 4
      for (int v = 0; v < kActive; ++v) {
        sums[r] = V::fma(V::load(probs + r * E::kLanes + v * E::kWidth), V::load(scale + v * E::kWidth), sums[r]);
      }
    }
  }
  V::sum_lanes(sums, totals);
}

// The same where the scale of some lane is no number: it reaches those keys alone that the lane sees.
template <class E>
FASTATTN_NOINLINE void weigh_broken(const Panel<E>& panel, const typename E::Scalar* probs,
                                    const typename E::Scalar* scale, typename E::Scalar* totals) {
  for (int r = 0; r < E::kGroupKeys; ++r) {
    totals[r] = 0;
    for (int lane = 0; lane < panel.live; ++lane) {
      const auto prob = probs[r * E::kLanes + lane];
      totals[r] += prob == 0 ? 0 : prob * scale[lane];
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

// Adds what the group of keys from `begin` on has received to the buckets of their distances. Eight keys and the rows
// of a panel are mostly in one bucket.
template <class E>
FASTATTN_NOINLINE void add_distances(const InsightParams& p, const Panel<E>& panel, int64_t begin,
                                     const typename E::Scalar* probs, const typename E::Scalar* scale,
                                     const typename E::Scalar* totals, double* distances) {
  const int64_t nearest = bucket_of(p, panel.position[0] - (begin + E::kGroupKeys - 1));
  const bool one = nearest == bucket_of(p, panel.position[panel.live - 1] - begin);
  for (int r = 0; r < E::kGroupKeys; ++r) {
    if (one) {
      distances[nearest] += static_cast<double>(totals[r]);
      continue;
    }
    for (int lane = 0; lane < panel.live; ++lane) {
      const auto prob = static_cast<double>(probs[r * E::kLanes + lane]);
      if (prob != 0) {
        distances[bucket_of(p, panel.position[lane] - (begin + r))] += prob * static_cast<double>(scale[lane]);
      }
    }
  }
}

// Adds up the weights of a panel over its rows, for the keys of one block that it sees.
template <class E, int kActive>
FASTATTN_NOINLINE void add_block_mass(const InsightCall<E>& call, const Panel<E>& panel, int64_t block, int64_t begin,
                                      int64_t end, const typename E::Scalar* inverse, const InsightPart<E>& part) {
  using Scalar = typename E::Scalar;
  alignas(64) Scalar scale[E::kLanes];
  const Scalar* under = nullptr;  // the shifts that the scale is for
  bool broken = false;
  for (int64_t key = begin; key < end; key += E::kGroupKeys) {
    const Scalar* shifts = panel.group_shifts(block, key - block);
    if (under == nullptr || shifts_differ<E>(shifts, under)) {
      under = shifts;
      find_scales<E>(panel, call.plan.forward.rules, shifts, inverse, scale);
      broken = false;
      for (int lane = 0; lane < panel.live; ++lane) {
        broken |= scale[lane] - scale[lane] != 0;
      }
    }
    const Scalar* probs = panel.block_probs(block) + (key - block) * E::kLanes;
    alignas(64) Scalar totals[8];
    if (FASTATTN_UNLIKELY(broken)) {
      weigh_broken<E>(panel, probs, scale, totals);
    } else {
      weigh_group<E, kActive>(probs, scale, totals);
    }
    for (int r = 0; r < E::kGroupKeys; ++r) {
      part.mass[key + r] += totals[r];
    }
    if (call.p.distance_mass != nullptr) {
      add_distances<E>(call.p, panel, key, probs, scale, totals, part.distances);
    }
  }
}

template <class E>
inline void add_mass(const InsightCall<E>& call, const ForwardTask<E>& task, TileContext<E>& context,
                     const Normaliser* normalisers, const InsightPart<E>& part) {
  using Scalar = typename E::Scalar;
  Panel<E>& panel = context.panel;
  alignas(64) Scalar inverse[E::kLanes];
  for (int lane = 0; lane < E::kLanes; ++lane) {
    inverse[lane] = lane < panel.live ? static_cast<Scalar>(normalisers[lane].inverse) : 0;
    // Where scores are computed again, shifts stay, and nothing is taken.
    panel.limit[lane] = panel.threshold[lane] = static_cast<Scalar>(__builtin_inf());
  }
  const auto add = panel.live > E::kWidth ? add_block_mass<E, E::kVectors> : add_block_mass<E, 1>;
  for (int64_t block = panel.origin; block < panel.last_max; block += E::kBlockKeys) {
    int64_t begin;
    int64_t end;
    if (!seen_of_block<E>(task, panel, block, &begin, &end)) {
      continue;
    }
    if (!panel.keeps_all) {
      prepare_block<E>(task, context, block, &begin, &end);
      score_block<E>(task, context, block_view<E>(task, block), begin, end);
    }
    add(call, panel, block, begin, end, inverse, part);
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

// The weights of a row's keys, written with their numbers.
template <class E>
inline void write_top_keys(const InsightParams& p, const ScoreRules<E>& rules, const Panel<E>& panel, int lane,
                           double inverse, int64_t* keys, typename E::Scalar* weights) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  const int64_t count = panel.best(lane, keys, weights);
  for (int64_t i = count; i < p.top_k; ++i) {
    keys[i] = -1;
    weights[i] = 0;
  }
  for (int64_t i = 0; i < count; i += E::kWidth) {  // as the softmax has them
    const int rest = static_cast<int>(min64(E::kWidth, count - i));
    auto x = V::load_partial(weights + i, rest);
    x = rules.natural ? x : V::mul(x, V::set1(rules.factor));
    x = V::mul(V::sub(x, V::set1(panel.shift[lane])), V::set1(static_cast<Scalar>(rules.to_log2())));
    x = V::mul(exp2<V>(x), V::set1(static_cast<Scalar>(inverse)));
    V::store_partial(weights + i, V::min(V::set1(1), x), rest);  // one of all may come out at 1 + 2^-23
  }
}

// Keys, weights and entropy of a panel's rows.
template <class E>
FASTATTN_NOINLINE void write_insight_rows(const InsightParams& p, const ScoreRules<E>& rules, const Panel<E>& panel,
                                          const Normaliser* normalisers) {
  using Result = typename E::Scalar;
  for (int lane = 0; lane < panel.live; ++lane) {
    const int64_t row = (panel.batch * p.forward.query_heads + panel.head[lane]) * p.forward.seqlen_q + panel.row[lane];
    static_cast<Result*>(p.entropy)[row] = static_cast<Result>(row_entropy<E>(panel, p.forward, rules, lane));
    write_top_keys<E>(p, rules, panel, lane, normalisers[lane].inverse, p.keys + row * p.top_k,
                      static_cast<Result*>(p.weights) + row * p.top_k);
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
    const int64_t round = dealt(sweep, group, plan.groups);
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
      panel.finish(min64(panel.last_max, task.keys));
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
  auto* key_mass = static_cast<Result*>(call.p.key_mass) + head * p.seqlen_k;
  const int64_t buckets = call.p.distance_mass == nullptr ? 0 : call.p.edge_count + 1;
  auto* distance_mass = static_cast<Result*>(call.p.distance_mass) + (buckets == 0 ? 0 : head * buckets);
  for (int64_t group = 0; group < plan.groups; ++group) {
    const InsightPart<E> part = InsightPart<E>::at(call, local_head, span, group);
    for (int64_t key = 0; key < p.seqlen_k; ++key) {
      key_mass[key] = group == 0 ? part.mass[key] : key_mass[key] + part.mass[key];
    }
    for (int64_t bucket = 0; bucket < buckets; ++bucket) {
      const double before = group == 0 ? 0 : static_cast<double>(distance_mass[bucket]);
      distance_mass[bucket] = static_cast<Result>(before + part.distances[bucket]);
    }
  }
}

template <class Engine>
void run_insight(const InsightParams& p) {
  using E = Observed<Engine>;
  const AttentionParams& forward = p.forward;
  const InsightPlan<E> plan = plan_insight<E>(p);
  const ForwardPlan<E>& tasks = plan.forward;
  const int64_t part_bytes = tasks.wave * tasks.spans * plan.groups * plan.part_bytes;
  run_waves<E>(forward, tasks, part_bytes, [&](ForwardCall<E>& call, int64_t wave, char* parts) {
    InsightCall<E> insight{p, plan, call, parts};
    parallel_for(wave * tasks.head_tasks, tasks.threads, insight_task<E>, &insight, forward.num_threads);
    parallel_for(wave * tasks.spans, tasks.threads, gather_mass<E>, &insight, forward.num_threads);
  });
}

}  // namespace
}  // namespace fastattn
