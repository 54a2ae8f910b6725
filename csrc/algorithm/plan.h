// How one call is cut: tasks of a few panels, what they pack and when, and the scratch of a thread.
#pragma once

#include "algorithm/chunk_sums.h"
#include "algorithm/dense_block.h"
#include "algorithm/operands.h"
#include "algorithm/row_values.h"
#include "algorithm/score_tile.h"
#include "algorithm/shared_chunks.h"
#include "algorithm/tile_softmax.h"
#include "parallel.h"
#include "workspace.h"

namespace fastattn {
namespace {

// Panels a task may hold: they share each key block while it is in the L2 cache. 1, 4 and 8 could not be told apart on
// a shared machine (float32, S2048); 4 keeps both threads busy on short sequences.
constexpr int kMaxPanels = 4;

// What mask and bias that heads share may take when they are transposed ahead of the tasks.
constexpr int64_t kDenseBudget = int64_t{32} << 20;

// Rows from which keys and values that are not adjacent rows (the "bshd" layout) are worth copying first. At S2048
// float32 read in place ran at 0.89 (D64) and 0.79 (D128) of the speed of adjacent rows, copied at 0.97 and 0.96.
constexpr int64_t kCopyStridedRows = 256;

// Work that a second thread has to find before it is woken, in nanoseconds: waking and waiting for it take a
// microsecond or two, and calls of 4 microseconds (8 heads of one query and one key) lost a quarter by it, calls of 10
// (32 such heads, or 12 heads of 16 rows) gained. A task takes about 250 by itself, a core 60 operations each.
constexpr double kThreadWork = 4000;
constexpr double kTaskTime = 250;
constexpr double kOperationsPerTime = 60;

// What a call with so many tasks takes on one thread, in nanoseconds.
inline double expected_time(const AttentionParams& p, int64_t tasks) {
  const double rows =
      static_cast<double>(p.batch) * static_cast<double>(p.query_heads) * static_cast<double>(p.seqlen_q);
  const double scores = rows * static_cast<double>(p.seqlen_k);
  const double operations = 2.0 * scores * static_cast<double>(p.head_dim + p.value_dim);
  return static_cast<double>(tasks) * kTaskTime + operations / kOperationsPerTime;
}

// How many of the threads that may be used are worth waking.
inline int worthwhile_threads(double time, int num_threads) {
  return time < kThreadWork * num_threads ? static_cast<int>(1 + time / kThreadWork) : num_threads;
}

inline int worthwhile_threads(const AttentionParams& p, int64_t tasks) {
  return worthwhile_threads(expected_time(p, tasks), p.num_threads);
}

// Whether a call's rows are few enough to be dotted with rows, one by one.
inline bool takes_rows(const AttentionParams& p) { return p.seqlen_q <= few_queries(p.dtype); }

// Which tiles of a key block have values that are not all finite, each found out when first asked for: the panels of a
// task share it.
template <class E>
struct FiniteValues {
  enum class Tile : uint8_t { unknown, finite, nonfinite };

  int64_t block;
  Tile tiles[E::kBlockKeys / E::kKeys];
  bool bad[E::kBlockKeys];  // of the tiles that are known

  void enter(int64_t at) {
    if (block != at) {
      block = at;
      memset(tiles, 0, sizeof tiles);
    }
  }
};

// The score tiles of one call: where every row sees every key, and where some row does not see some key.
template <class E>
struct TileFns {
  TileFn<E> plain;
  TileFn<E> masked;
  PassFn<E> scan_plain;  // these two for Method::tiles,
  PassFn<E> scan_masked;
  TileFn<E> keep_plain;  // these for engines that observe
  TileFn<E> keep_masked;
  PassFn<E> exponentiate;  // the second pass of both
};

// Between rows of scores that stay: whole registers of them are written.
inline int64_t kept_stride(const AttentionParams& p) { return round_up(p.seqlen_k, 16); }

// Queries from which the keys of a row are no longer cut into chunks: rows are tasks enough, and each pass over a chunk
// ends with its sums.
constexpr int64_t kManyQueries = 64;
// Keys of a chunk, whole blocks of every engine: half a megabyte of bfloat16 keys and values of 128 columns, 30
// microseconds of reading, beside which its sums are nothing.
template <class E>
constexpr int64_t kChunkKeys = (1024 + E::kBlockKeys - 1) / E::kBlockKeys * E::kBlockKeys;
// Tasks of whole rows for each thread from which their chunks are not tasks of their own: threads then end together.
constexpr int64_t kTasksOfThread = 64;

// How one call is cut.
template <class E>
struct ForwardPlan {
  OperandLayout layout;
  ScoreRules<E> rules;
  TileFns<E> tiles[E::kVectors];  // for panels of 1, ... kVectors vectors of live lanes
  double query_factor;
  int panels;           // of a task
  int64_t spans;        // stretches of rows a key/value head falls into: one a query head, or one for all
  int64_t span_rows;    // rows of a span
  int64_t span_panels;  // panels of a span
  int64_t span_tasks;   // tasks of a span
  int64_t head_tasks;   // tasks of a key/value head
  int64_t keys;         // of the longest sequence
  int64_t chunks;       // that its keys are attended to by, each for itself
  int64_t task_chunks;  // tasks that these are dealt to: all to one, or one to each
  int64_t sums_bytes;   // of what a panel sums over a chunk
  int members;          // sequences that a task reads shared pages for, at most
  // Each task packs block by block into its own scratch: where a key/value head has one task, or is too long to be
  // packed as a whole.
  bool pack_in_task;
  int64_t head_bytes;  // packed operands of a key/value head; 0 where nothing is packed ahead
  int64_t wave;        // key/value heads whose operands are packed at once
  // Mask and bias that several heads share are transposed once, into tables for so many batches and spans of each.
  int64_t dense_batches;
  int64_t dense_spans;
  int64_t dense_bytes;  // of a panel of them; 0: every task reads them for itself
  int threads;
  // byte offsets of a thread's scratch
  int64_t query_bytes;  // of a panel
  int64_t query_at, output_at, probs_at, kept_at, raw_at, dense_at, finite_at, tail_at, table_at, sums_at, clean_at,
      packed_at, thread_bytes;

  // A task goes through several chunks, and adds each up before the next.
  bool folds() const { return chunks > 1 && task_chunks == 1; }
  int64_t packed_keys() const { return round_up(keys, E::kHeadMultiple); }
  int64_t all_sums_bytes() const { return task_chunks > 1 ? head_tasks * panels * sums_bytes : 0; }  // of a head
};

template <class E>
inline void plan_scratch(ForwardPlan<E>& plan, const AttentionParams& p) {
  using Scalar = typename E::Scalar;
  constexpr auto kScalar = static_cast<int64_t>(sizeof(Scalar));
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const int64_t start = bytes;
    bytes += round_up(size, kScratchAlign);
    return start;
  };
  const int64_t panels = int64_t{plan.panels} * plan.members;
  take(panels * static_cast<int64_t>(sizeof(Panel<E>)));
  plan.query_bytes = query_row_lanes<E>(p) * E::kLanes * kScalar;
  plan.query_at = take(panels * plan.query_bytes);
  plan.output_at = take(panels * E::kLanes * plan.rules.output_stride * kScalar);
  plan.probs_at = take(E::kPlanes * kPlaneSize<E> * kScalar);
  plan.kept_at = take(p.dropout.threshold > 0 ? int64_t{E::kKeys} * E::kLanes * kScalar : 0);
  plan.raw_at = take(E::kMethod == Method::tiles ? int64_t{E::kBlockKeys} * E::kLanes * kScalar : 0);
  plan.dense_at = take(plan.dense_bytes == 0 ? DenseRoom<E>::bytes(p, E::kBlockKeys) : 0);
  plan.finite_at = take(sizeof(FiniteValues<E>));
  plan.tail_at = take(E::kKeys * plan.layout.key_row_bytes);
  plan.table_at = take(E::kMethod == Method::rows ? sizeof(RowTable<E>) : 0);
  plan.sums_at = take(plan.folds() ? plan.panels * plan.sums_bytes : 0);
  plan.clean_at = take(E::kBlockKeys / E::kDepth * plan.layout.value_row_bytes);
  plan.packed_at = take(plan.pack_in_task ? plan.layout.head_bytes(E::kBlockKeys, E::kDepth) : 0);
  // A page between threads keeps their lines apart.
  plan.thread_bytes = round_up(bytes, 4096);
}

template <class E, int kActive>
inline TileFns<E> choose_tiles(bool general) {
  TileFns<E> fns{};
  if constexpr (E::kMethod == Method::tiles) {
    fns.scan_plain = general ? scan_tile<E, TileKind::adjusted, kActive> : scan_tile<E, TileKind::plain, kActive>;
    fns.scan_masked =
        general ? scan_tile<E, TileKind::adjusted_masked, kActive> : scan_tile<E, TileKind::masked, kActive>;
    fns.exponentiate = general ? exponentiate_tile<E, true, kActive> : exponentiate_tile<E, false, kActive>;
  } else if constexpr (E::kMethod == Method::broadcast) {
    fns.plain = general ? score_tile<E, TileKind::adjusted, kActive> : score_tile<E, TileKind::plain, kActive>;
    fns.masked = general ? score_tile<E, TileKind::adjusted_masked, kActive> : score_tile<E, TileKind::masked, kActive>;
  }
  if constexpr (E::kObserves) {
    fns.keep_plain = general ? keep_tile<E, TileKind::adjusted, kActive> : keep_tile<E, TileKind::plain, kActive>;
    fns.keep_masked =
        general ? keep_tile<E, TileKind::adjusted_masked, kActive> : keep_tile<E, TileKind::masked, kActive>;
    fns.exponentiate = general ? exponentiate_tile<E, true, kActive> : exponentiate_tile<E, false, kActive>;
  }
  return fns;
}

// A cap past the type's range caps nothing; one below it is its smallest normal number.
template <class Scalar>
inline Scalar finite_softcap(double softcap) {
  constexpr bool kDouble = sizeof(Scalar) == sizeof(double);
  constexpr double kLargest = kDouble ? __DBL_MAX__ : __FLT_MAX__;
  constexpr double kSmallest = kDouble ? __DBL_MIN__ : __FLT_MIN__;
  if (softcap <= 0 || softcap >= kLargest) {
    return 0;
  }
  return static_cast<Scalar>(softcap < kSmallest ? kSmallest : softcap);
}

// Whether something is added to scores, caps them, or drops probabilities: scores are natural logarithms then.
inline bool adjusts_scores(const AttentionParams& p) {
  return p.bias != nullptr || p.alibi_slopes != nullptr || p.softcap > 0 || p.dropout.threshold > 0;
}

inline double score_factor(const AttentionParams& p) { return p.scale * (adjusts_scores(p) ? 1.0 : kLog2E); }

// What multiplies queries when they are packed. The product that cannot take the scale into the query takes its sign,
// since a maximum must stay one.
template <class E>
inline double query_factor(const AttentionParams& p) {
  const double factor = score_factor(p);
  return E::Product::kScaleQuery ? factor : (factor < 0 ? -1.0 : 1.0);
}

template <class E>
inline ScoreRules<E> score_rules(const AttentionParams& p) {
  using Scalar = typename E::Scalar;
  ScoreRules<E> rules{};
  const double factor = score_factor(p);
  rules.natural = adjusts_scores(p);
  // At least the smallest normal number: 0 would turn a hidden score, -inf, into NaN.
  const double magnitude = factor < -0x1p-126 ? -factor : factor > 0x1p-126 ? factor : 0x1p-126;
  rules.factor = static_cast<Scalar>(E::Product::kScaleQuery ? 1.0 : magnitude);
  rules.steps = query_row_lanes<E>(p);
  rules.softcap = finite_softcap<Scalar>(p.softcap);
  rules.alibi = p.alibi_slopes != nullptr;
  rules.dropout = p.dropout;
  rules.output_stride = padded_value_dim<E>(p);
  return rules;
}

// Whether mask and bias are the same for several heads, and worth transposing ahead. A mask of 2048 by 2048 that each
// of eight heads read for itself took a tenth of a causal call, a bias a fifth of a full one.
template <class E>
inline void plan_dense(ForwardPlan<E>& plan, const AttentionParams& p) {
  const auto moves = [&](int axis) {
    return (p.mask != nullptr && p.mask_strides[axis] != 0) || (p.bias != nullptr && p.bias_strides[axis] != 0) ||
           (p.scattered_segments && axis != 1);
  };
  const int64_t spans = p.kv_heads * plan.spans;
  plan.dense_batches = moves(0) ? p.batch : 1;
  plan.dense_spans = moves(1) ? spans : 1;
  const bool shared = p.batch * spans >= 2 * plan.dense_batches * plan.dense_spans;
  if (E::kMethod == Method::rows || !shared || !moves(2) || p.seqlen_k == 0 || p.seqlen_k > kDenseBudget) {
    return;
  }
  const int64_t bytes = DenseRoom<E>::bytes(p, round_up(p.seqlen_k, E::kBlockKeys));
  if (kDenseBudget / bytes / plan.span_panels / plan.dense_spans >= plan.dense_batches) {
    plan.dense_bytes = bytes;
  }
}

inline int64_t longest_sequence(const AttentionParams& p) {
  int64_t longest = p.kv_lengths == nullptr ? p.seqlen_k : 0;
  for (int64_t b = 0; p.kv_lengths != nullptr && b < p.batch; ++b) {
    longest = max64(longest, existing_keys(p, b));
  }
  return longest;
}

// Few queries: their keys are cut into chunks at fixed places, by the length alone, so that bits depend on nothing
// else; every chunk has a softmax of its own and the sums of all are added in order. Where there are few tasks each
// chunk is one.
template <class E>
inline void plan_chunks(ForwardPlan<E>& plan, const AttentionParams& p) {
  plan.chunks = p.seqlen_q < kManyQueries ? max64((plan.keys + kChunkKeys<E> - 1) / kChunkKeys<E>, 1) : 1;
  plan.sums_bytes = ChunkSums<E>::bytes(plan.rules.output_stride);
  const int64_t tasks = p.batch * p.kv_heads * plan.spans * plan.span_tasks;
  const bool fits = plan.keys <= kPackedBudget && p.weights == nullptr &&  // longer ones may exceed 64 bits
                    tasks * plan.chunks * plan.panels * plan.sums_bytes <= kPackedBudget;
  const bool shares = fits && plan.chunks > 1 && plan.spans * plan.span_tasks == 1 && p.mask == nullptr &&
                      p.bias == nullptr && shares_pages(p, kChunkKeys<E>);
  plan.members = shares ? static_cast<int>(min64(p.batch, kMaxMembers)) : 1;
  plan.task_chunks = fits && (shares || tasks < kTasksOfThread * p.num_threads) ? plan.chunks : 1;
}

// What follows from the call's arguments alone, before it is cut.
template <class E>
inline ForwardPlan<E> start_plan(const AttentionParams& p) {
  ForwardPlan<E> plan{};
  plan.keys = longest_sequence(p);
  plan.layout = operand_layout<E>(p, p.query_heads / p.kv_heads * p.seqlen_q >= kCopyStridedRows);
  plan.layout.pack_value &= p.out != nullptr;
  plan.rules = score_rules<E>(p);
  plan.query_factor = query_factor<E>(p);
  const bool general = plan.rules.natural;
  plan.tiles[0] = choose_tiles<E, 1>(general);
  plan.tiles[E::kVectors - 1] = choose_tiles<E, E::kVectors>(general);
  return plan;
}

// Packing, heads in flight and scratch, once it is known what a task is. `held_bytes`: what a head in flight holds
// besides packed operands.
template <class E>
inline void finish_plan(ForwardPlan<E>& plan, const AttentionParams& p, int64_t held_bytes) {
  plan.head_tasks = plan.spans * plan.span_tasks * plan.task_chunks;
  const bool packs = plan.layout.pack_key || plan.layout.pack_value;
  // Lengths past the budget are not multiplied: with strides of 0 the product may exceed 64 bits.
  const bool fits = plan.keys <= kPackedBudget;
  const int64_t packed = packs && fits ? plan.layout.head_bytes(plan.packed_keys(), E::kDepth) : 0;
  plan.pack_in_task = packs && (plan.spans * plan.span_tasks == 1 || !fits || packed > kPackedBudget);
  plan.head_bytes = plan.pack_in_task ? 0 : round_up(packed, kScratchAlign);
  const int64_t all_heads = p.batch * p.kv_heads;
  const int64_t head_bytes = plan.head_bytes + held_bytes;
  plan.wave = head_bytes == 0 ? all_heads : clamp64(kPackedBudget / head_bytes, 1, all_heads);
  plan.threads = effective_threads(plan.wave * plan.head_tasks, worthwhile_threads(p, all_heads * plan.head_tasks));
  plan_dense<E>(plan, p);
  plan_scratch<E>(plan, p);
}

// `held_bytes`: see finish_plan.
template <class E>
inline ForwardPlan<E> plan_forward(const AttentionParams& p, int64_t held_bytes = 0) {
  ForwardPlan<E> plan = start_plan<E>(p);
  const int64_t group = p.query_heads / p.kv_heads;

  // Short sequences: rows of the heads that share keys stand side by side in the lanes.
  const bool together = p.seqlen_q < 4 * E::kLanes;
  plan.spans = together ? 1 : group;
  plan.span_rows = together ? group * p.seqlen_q : p.seqlen_q;
  const int64_t heads = p.batch * p.kv_heads * plan.spans;
  plan.span_panels = (plan.span_rows + E::kLanes - 1) / E::kLanes;
  plan.panels = static_cast<int>(min64(kMaxPanels, plan.span_panels));
  while (plan.panels > 1 && heads * ((plan.span_panels + plan.panels - 1) / plan.panels) < int64_t{2} * p.num_threads) {
    plan.panels /= 2;
  }
  plan.span_tasks = (plan.span_panels + plan.panels - 1) / plan.panels;
  plan_chunks<E>(plan, p);
  plan.head_tasks = plan.spans * plan.span_tasks * plan.task_chunks;
  finish_plan<E>(plan, p, plan.all_sums_bytes() + held_bytes);
  return plan;
}

}  // namespace
}  // namespace fastattn
