// Insight of few queries. The forward goes the way of rows, which reads keys and values where they lie, and the scores
// of its rows stay; then each head's rows are gone over, which are nothing beside the keys.
#pragma once

#include "algorithm/insight.h"
#include "algorithm/row_engine.h"

namespace fastattn {
namespace {

// Scores of a key/value head's rows that stay, at most. More go the way of many queries, which keeps none.
constexpr int64_t kKeptScores = int64_t{64} << 20;

template <class E>
struct RowsCall {
  const InsightParams& p;
  const ForwardCall<E>& forward;
  const ScoreRules<Observed<E>>& rules;  // of scores that stay
  char* own;                             // [threads][own_bytes]: of buckets, then of candidates
  int64_t own_bytes;
  int64_t candidates_at;
};

// Whether a call is such a one.
template <class E>
inline bool takes_rows(const InsightParams& p) {
  const AttentionParams& forward = p.forward;
  // Lengths past the bound are not multiplied.
  return takes_rows(forward) && forward.seqlen_k <= kKeptScores &&
         forward.query_heads / forward.kv_heads * forward.seqlen_q <=
             kKeptScores / max64(kept_stride(forward), 1) / static_cast<int64_t>(sizeof(typename E::Scalar));
}

// Notes the scores of a lane's row, of keys [first, last), and makes them probabilities under their maximum. The
// others, up to whole registers, become 0.
template <class E>
FASTATTN_NOINLINE void note_row(Panel<Observed<E>>& panel, const ScoreRules<Observed<E>>& rules, int lane,
                                typename E::Scalar* row) {
  using V = typename E::V;
  using Scalar = typename E::Scalar;
  constexpr auto kLowest = -static_cast<Scalar>(__builtin_inf());
  const int64_t first = panel.first[lane];
  const int64_t last = panel.last[lane];
  const int64_t begin = round_down(first, E::kWidth);
  const int64_t end = round_up(last, E::kWidth);
  for (int64_t key = begin; key < first; ++key) {
    row[key] = kLowest;
  }
  for (int64_t key = last; key < end; ++key) {
    row[key] = kLowest;
  }
  auto peak = V::set1(kLowest);
  for (int64_t key = begin; key < end; key += E::kWidth) {
    peak = V::max(V::load(row + key), peak);  // a NaN is passed over
  }
  const Scalar largest = largest_lane<E>(peak);
  const auto shift = V::set1(largest == kLowest ? 0 : largest);
  const auto to_log2 = V::set1(static_cast<Scalar>(rules.to_log2()));
  double sum = 0;
  double logs = 0;
  for (int64_t block = begin; block < end; block += E::kBlockKeys) {
    auto block_sum = V::zero();
    auto block_logs = V::zero();
    for (int64_t key = block; key < min64(block + E::kBlockKeys, end); key += E::kWidth) {
      const auto score = V::load(row + key);
      uint32_t hits = V::bits(V::less(V::set1(panel.threshold[lane]), score));
      for (; FASTATTN_UNLIKELY(hits); hits &= hits - 1) {
        const int i = __builtin_ctz(hits);
        panel.add(lane, row[key + i], key + i);
      }
      const auto x = V::mul(V::sub(score, shift), to_log2);
      const auto prob = exp2<V>(x);
      V::store(row + key, prob);
      block_sum = V::add(block_sum, prob);
      // Where a probability is 0, its logarithm must not be infinite.
      block_logs = V::fma(prob, V::max(V::set1(V::kZeroPower), x), block_logs);
    }
    sum += lane_sum<E>(block_sum);
    logs += lane_sum<E>(block_logs);
  }
  panel.shift[lane] = largest == kLowest ? 0 : largest;
  panel.sum[lane] = static_cast<Scalar>(sum);
  panel.log_sum[lane] = static_cast<Scalar>(logs);
}

// Adds the weights of a lane's row to what its keys have received.
template <class E>
FASTATTN_NOINLINE void add_row_mass(const Panel<Observed<E>>& panel, int lane, const typename E::Scalar* row,
                                    typename E::Scalar inverse, typename E::Scalar* mass, int64_t keys) {
  using V = typename E::V;
  const int64_t first = panel.first[lane];
  const int64_t last = panel.last[lane];
  if (FASTATTN_UNLIKELY(inverse - inverse != 0)) {  // no number: it reaches those keys alone that the row sees
    for (int64_t key = first; key < last; ++key) {
      mass[key] += row[key] == 0 ? 0 : row[key] * inverse;
    }
    return;
  }
  const auto scale = V::set1(inverse);
  for (int64_t key = round_down(first, E::kWidth); key < last; key += E::kWidth) {
    const int rest = static_cast<int>(min64(E::kWidth, keys - key));
    V::store_partial(mass + key, V::fma(V::load(row + key), scale, V::load_partial(mass + key, rest)), rest);
  }
}

// The same, to the buckets of their distances, which fall from key to key.
template <class E>
inline void add_row_distances(const InsightParams& p, const Panel<Observed<E>>& panel, int lane,
                              const typename E::Scalar* row, double inverse, double* distances) {
  for (int64_t key = panel.first[lane]; key < panel.last[lane];) {
    const int64_t bucket = bucket_of(p, panel.position[lane] - key);
    const int64_t end =
        bucket == 0 ? panel.last[lane] : min64(panel.last[lane], panel.position[lane] - p.edges[bucket - 1] + 1);
    for (; key < end; ++key) {
      distances[bucket] += row[key] == 0 ? 0 : static_cast<double>(row[key]) * inverse;
    }
  }
}

// What the rows of one query head look at, after the forward.
template <class E>
void look_task(void* opaque, int64_t index, int thread) {
  using Scalar = typename E::Scalar;
  using Seen = Observed<E>;
  const auto& call = *static_cast<const RowsCall<E>*>(opaque);
  const AttentionParams& p = call.p.forward;
  const int64_t group = p.query_heads / p.kv_heads;
  const int64_t kv_head = call.forward.first_head + index / group;  // over batch and heads
  const int64_t head = call.forward.first_head * group + index;
  const int64_t begin = index % group * p.seqlen_q;
  const int64_t buckets = call.p.distance_mass == nullptr ? 0 : call.p.edge_count + 1;
  auto* mass = static_cast<Scalar*>(call.p.key_mass) + head * p.seqlen_k;
  char* own = call.own + thread * call.own_bytes;
  auto* distances = reinterpret_cast<double*>(own);
  memset(mass, 0, sizeof(Scalar) * static_cast<size_t>(p.seqlen_k));
  memset(distances, 0, sizeof(double) * static_cast<size_t>(buckets));
  const typename E::V::FlushDenormals flush;
  for (int64_t first = 0; first < p.seqlen_q; first += E::kLanes) {
    Panel<Seen> panel;
    panel.place(own + call.candidates_at, min64(call.p.top_k, max64(p.seqlen_k, 1)));
    place_rows<Seen>(panel, p, {kv_head / p.kv_heads, kv_head % p.kv_heads, begin, begin + p.seqlen_q}, begin + first);
    Normaliser normalisers[E::kLanes];
    for (int lane = 0; lane < panel.live; ++lane) {
      Scalar* row = call.forward.scores + (index * p.seqlen_q + first + lane) * kept_stride(p);
      note_row<E>(panel, call.rules, lane, row);
      normalisers[lane] = normaliser<Seen>(panel, p, call.rules, lane, false);
      const double inverse = normalisers[lane].inverse;
      add_row_mass<E>(panel, lane, row, static_cast<Scalar>(inverse), mass, p.seqlen_k);
      if (buckets > 0) {
        add_row_distances<E>(call.p, panel, lane, row, inverse, distances);
      }
    }
    write_insight_rows<Seen>(call.p, call.rules, panel, normalisers);
  }
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    static_cast<Scalar*>(call.p.distance_mass)[head * buckets + bucket] = static_cast<Scalar>(distances[bucket]);
  }
}

template <class E>
void run_insight_rows(const InsightParams& p) {
  const AttentionParams& forward = p.forward;
  const int64_t group = forward.query_heads / forward.kv_heads;
  const int64_t score_bytes =
      round_up(head_scores(forward) * static_cast<int64_t>(sizeof(typename E::Scalar)), kScratchAlign);
  const ForwardPlan<E> plan = plan_forward<E>(forward, score_bytes);
  ScoreRules<Observed<E>> rules = score_rules<Observed<E>>(forward);
  rules.factor = 1;  // it is in the scores
  const int64_t candidates_at = round_up((p.edge_count + 1) * static_cast<int64_t>(sizeof(double)), kScratchAlign);
  const int64_t own_bytes =
      round_up(candidates_at + Candidates<Observed<E>>::bytes(min64(p.top_k, max64(forward.seqlen_k, 1))), 4096);
  const int64_t kept_bytes = plan.wave * score_bytes;
  run_waves<E>(forward, plan, kept_bytes + forward.num_threads * own_bytes,
               [&](ForwardCall<E>& call, int64_t wave, char* own) {
                 call.scores = reinterpret_cast<typename E::Scalar*>(own);
                 parallel_for(wave * plan.head_tasks, plan.threads, run_turn<E>, &call, forward.num_threads);
                 RowsCall<E> looking{p, call, rules, own + kept_bytes, own_bytes, candidates_at};
                 parallel_for(wave * group, plan.threads, look_task<E>, &looking, forward.num_threads);
               });
}

// `Few`: the engine of few queries, `Many`: of more.
template <class Few, class Many>
void insight(const InsightParams& p) {
  if (p.forward.batch == 0 || p.forward.query_heads == 0 || p.forward.seqlen_q == 0) {
    return;
  }
  if (takes_rows<Few>(p)) {
    run_insight_rows<Few>(p);
  } else {
    run_insight<Many>(p);
  }
}

}  // namespace
}  // namespace fastattn
