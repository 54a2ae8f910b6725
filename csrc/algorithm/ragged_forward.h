// The forward of many calls at once, sequences of any length: operands of all are packed in one loop, and the tasks of
// all run in one. Bits are those of each call alone.
#pragma once

#include "algorithm/forward.h"
#include "algorithm/merged_loop.h"

namespace fastattn {
namespace {

// What calls of either engine look like to a wave.
struct RaggedForward {
  const AttentionParams* p;
  char* plan;  // of the call's engine, and so is the next
  char* call;
  int64_t heads;
  int64_t taken;       // of these by earlier waves
  int64_t head_bytes;  // of a wave: packed operands, and what chunks add up to
  int64_t head_tasks;
  int64_t head_packs;  // tasks that pack a head
  int64_t thread_bytes;
  TaskFn pack;
  TaskFn run;
  // Writes the call for so many heads from the first that is not taken, whose room in the wave is given.
  void (*place)(RaggedForward& one, int64_t heads, char* scratch, int64_t thread_bytes, char* room);
};

template <class E>
inline int64_t counter_bytes(const ForwardPlan<E>& plan) {  // of a head
  return plan.task_chunks > 1 ? plan.head_tasks / plan.task_chunks * static_cast<int64_t>(sizeof(int32_t)) : 0;
}

template <class E>
void place_ragged(RaggedForward& one, int64_t heads, char* scratch, int64_t thread_bytes, char* room) {
  auto* plan = reinterpret_cast<ForwardPlan<E>*>(one.plan);
  plan->thread_bytes = thread_bytes;
  char* sums = room + heads * plan->head_bytes;
  char* counters = sums + heads * plan->all_sums_bytes();
  memset(counters, 0, static_cast<size_t>(heads * counter_bytes(*plan)));
  const ForwardCall<E> call{*one.p,    *plan,     scratch, room,   nullptr, sums, reinterpret_cast<int32_t*>(counters),
                            one.taken, one.heads, {},      nullptr};
  memcpy(one.call, &call, sizeof call);
}

// `share`: threads that the call may count on.
template <class E>
inline void plan_ragged(RaggedForward& one, int share) {
  AttentionParams p = *one.p;
  p.num_threads = share;
  auto* plan = reinterpret_cast<ForwardPlan<E>*>(one.plan);
  *plan = plan_forward<E>(p);
  one.heads = p.batch * p.kv_heads;
  one.head_bytes = plan->head_bytes + plan->all_sums_bytes() + round_up(counter_bytes(*plan), kScratchAlign);
  one.head_tasks = plan->head_tasks;
  one.head_packs = plan->head_bytes > 0 ? (plan->keys + E::kBlockKeys - 1) / E::kBlockKeys : 0;
  one.thread_bytes = plan->thread_bytes;
  one.pack = pack_task<E>;
  one.run = run_task<E>;
  one.place = place_ragged<E>;
}

// Runs the calls' tasks on so many threads, in waves of heads that fit into `wave_bytes`, which each does by itself.
inline void run_ragged_waves(RaggedForward* calls, int64_t count, LoopPart* parts, int threads, int allowed,
                             char* scratch, int64_t thread_bytes, int64_t wave_bytes) {
  MergedLoop packing{parts, 0, 0};
  MergedLoop running{parts + count, 0, 0};
  char* rooms = scratch + threads * thread_bytes;
  for (int64_t at = 0; at < count;) {
    for (int64_t bytes = 0; at < count;) {
      RaggedForward& one = calls[at];
      const int64_t left = one.heads - one.taken;
      const int64_t heads = one.head_bytes == 0 ? left : min64(left, (wave_bytes - bytes) / one.head_bytes);
      if (heads > 0) {
        one.place(one, heads, scratch, thread_bytes, rooms + bytes);
      }
      packing.add(heads * one.head_packs, one.pack, one.call);
      running.add(heads * one.head_tasks, one.run, one.call);
      bytes += heads * one.head_bytes;
      one.taken += heads;
      if (heads < left) {
        break;
      }
      ++at;
    }
    packing.run(threads, allowed);
    running.run(threads, allowed);
  }
}

template <class Few, class Many>
void run_ragged_forward(const AttentionParams* calls, int64_t count) {
  constexpr auto kPlan = static_cast<int64_t>(sizeof(ForwardPlan<Few>) + sizeof(ForwardPlan<Many>));  // of either
  constexpr auto kCall = static_cast<int64_t>(sizeof(ForwardCall<Few>) + sizeof(ForwardCall<Many>));
  constexpr auto kRecord = static_cast<int64_t>(sizeof(RaggedForward) + 2 * sizeof(LoopPart)) + kPlan + kCall;
  const Workspace memory(static_cast<size_t>(count * kRecord));
  auto* records = reinterpret_cast<RaggedForward*>(memory.data());
  auto* parts = reinterpret_cast<LoopPart*>(records + count);
  char* plans = reinterpret_cast<char*>(parts + 2 * count);
  double time = 0;
  for (int64_t i = 0; i < count; ++i) {
    time += expected_time(calls[i], 1);
  }
  const int allowed = calls[0].num_threads;
  const int threads = effective_threads(INT64_MAX, worthwhile_threads(time, allowed));
  int64_t thread_bytes = 0;
  int64_t wave_bytes = 0;
  int64_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    RaggedForward& one = records[i];
    one = {};
    one.p = calls + i;
    one.plan = plans + i * (kPlan + kCall);
    one.call = one.plan + kPlan;
    const int share = static_cast<int>(1 + threads * (expected_time(calls[i], 1) / time));
    if (calls[i].seqlen_q > 0) {
      (takes_rows(calls[i]) ? plan_ragged<Few> : plan_ragged<Many>)(one, share);
    }
    thread_bytes = max64(thread_bytes, one.thread_bytes);
    wave_bytes += one.heads * one.head_bytes;
    largest = max64(largest, one.head_bytes);
  }
  wave_bytes = min64(wave_bytes, max64(kPackedBudget, largest));
  const Workspace scratch(static_cast<size_t>(threads * thread_bytes + wave_bytes));
  run_ragged_waves(records, count, parts, threads, allowed, scratch.data(), thread_bytes, wave_bytes);
}

// Of a type that goes with no quantised keys.
template <class Few, class Many>
void forward(const AttentionParams* calls, int64_t count) {
  if (count == 1) {
    (takes_rows(calls[0]) ? run_forward<Few> : run_forward<Many>)(calls[0]);
    return;
  }
  for (int64_t first = 0; first < count; first += kCallsAtOnce) {
    run_ragged_forward<Few, Many>(calls + first, min64(count - first, kCallsAtOnce));
  }
}

}  // namespace
}  // namespace fastattn
