// The backward of many calls at once, sequences of any length: each step is one loop over the tasks of all of them.
//
// Heads that are short are gone through from end to end by one thread, beside the key groups of the long ones. Bits are
// those of each call alone.
#pragma once

#include "algorithm/backward.h"
#include "algorithm/merged_loop.h"

namespace fastattn {
namespace {

// Key groups for each thread with which a wave is full.
constexpr int64_t kGroupsOfThread = 4;

// One of the calls, in the order of their work.
template <class E>
struct RaggedBackward {
  const BackwardParams* b;
  BadSearch<E> search;
  BackwardPlan<E> plan;
  alignas(8) char memory[sizeof(BackwardCall<E>)];
  int64_t taken;  // heads of earlier waves

  BackwardCall<E>& call() { return *reinterpret_cast<BackwardCall<E>*>(memory); }
  int64_t heads() const { return b->forward.batch * b->forward.kv_heads; }
};

template <class E>
struct RaggedBackwards {
  RaggedBackward<E>* calls;
  int64_t count;
  MergedLoop loop;
  int threads;  // that run tasks
  int allowed;
  int64_t thread_bytes;
  int64_t room_bytes;  // of a thread, for a whole head
  int64_t wave_bytes;
};

template <class E>
inline void search_all(RaggedBackwards<E>& all, char* flags) {
  for (int64_t i = 0; i < all.count; ++i) {
    RaggedBackward<E>& one = all.calls[i];
    const int64_t bytes = search_bytes(one.b->forward);
    if (bytes > 0) {
      one.search = bad_search<E>(*one.b, flags);
      for (int part = 0; part < 3; ++part) {
        all.loop.add(one.search.tasks(part), search_head<E>, &one.search.rows[part]);
      }
      flags += bytes;
    }
  }
  all.loop.run(all.threads, all.allowed);
}

template <class E>
inline void plan_all(RaggedBackwards<E>& all) {
  int64_t short_heads = 0;
  for (int64_t i = 0; i < all.count; ++i) {
    RaggedBackward<E>& one = all.calls[i];
    BackwardParams b = *one.b;
    b.forward.num_threads = all.threads;
    const BadRows bad = search_bytes(b.forward) > 0 ? one.search.result() : BadRows{};
    one.plan = plan_backward<E>(b, bad.query != nullptr);
    one.plan.threads = all.threads;
    one.plan.whole_heads = fits_thread(one.plan, b);
    short_heads += one.plan.whole_heads ? one.heads() : 0;
    const BackwardCall<E> call{*one.b, one.plan, bad, nullptr, nullptr, 0, 0, 0};
    memcpy(one.memory, &call, sizeof call);
  }
  const bool shares_out = short_heads % all.threads == 0 || short_heads >= kManyHeads * all.threads;
  int64_t longest = 0;
  for (int64_t i = 0; i < all.count; ++i) {
    RaggedBackward<E>& one = all.calls[i];
    BackwardPlan<E>& plan = one.plan;
    plan.whole_heads &= shares_out;
    all.thread_bytes = max64(all.thread_bytes, plan.thread_bytes);
    if (plan.whole_heads) {
      all.room_bytes = max64(all.room_bytes, plan.head_bytes);
      one.taken = one.heads();
    } else {
      longest = max64(longest, plan.head_bytes);
      all.wave_bytes = min64(all.wave_bytes + min64(one.heads(), plan.wave) * plan.head_bytes, kEndlessScratch);
    }
  }
  all.wave_bytes = min64(all.wave_bytes, max64(longest, kPackedBudget));
}

// Takes heads of the calls from `at` on for one wave, and returns the call after the last of these.
template <class E>
inline int64_t fill_wave(RaggedBackwards<E>& all, int64_t at, char* heads) {
  int64_t bytes = 0;
  int64_t groups = 0;
  for (; at < all.count && groups < kGroupsOfThread * all.threads; ++at) {
    RaggedBackward<E>& one = all.calls[at];
    const int64_t left = one.heads() - one.taken;
    if (left == 0) {  // it is done, or its heads are not taken in waves
      continue;
    }
    const int64_t room = (all.wave_bytes - bytes) / one.plan.head_bytes;
    const int64_t taken = min64(min64(left, one.plan.wave), room);
    one.call().heads = heads + bytes;
    one.call().first_head = one.taken;
    one.call().head_count = taken;
    one.taken += taken;
    bytes += taken * one.plan.head_bytes;
    groups += taken * one.plan.key_groups;
    if (taken < left) {
      return at + 1;
    }
  }
  return at;
}

// Calls from the first that has heads left.
template <class E>
inline int64_t first_unfinished(const RaggedBackwards<E>& all, int64_t at) {
  while (at < all.count && all.calls[at].taken == all.calls[at].heads()) {
    ++at;
  }
  return at;
}

template <class E>
inline void run_waves(RaggedBackwards<E>& all, char* scratch) {
  char* rooms = scratch + all.threads * all.thread_bytes;
  char* heads = rooms + all.threads * all.room_bytes;
  for (int64_t i = 0; i < all.count; ++i) {
    RaggedBackward<E>& one = all.calls[i];
    one.plan.thread_bytes = all.thread_bytes;
    one.call().threads = scratch;
    one.call().heads = rooms;
    one.call().room_bytes = all.room_bytes;
  }
  bool last = false;
  for (int64_t at = first_unfinished(all, 0); !last;) {
    const int64_t end = fill_wave(all, at, heads);
    const int64_t next = first_unfinished(all, at);
    last = next == all.count;
    for (int step = 0; step < kBackwardSteps; ++step) {
      for (int64_t i = at; i < end; ++i) {
        const BackwardStep part = backward_step<E>(all.calls[i].call(), step);
        all.loop.add(part.tasks, part.run, all.calls[i].memory);
      }
      for (int64_t i = 0; last && step == kGroupStep && i < all.count; ++i) {
        RaggedBackward<E>& one = all.calls[i];
        all.loop.add(one.plan.whole_heads ? one.heads() : 0, run_head<E>, one.memory);
      }
      all.loop.run(all.threads, all.allowed);
    }
    for (int64_t i = at; i < end; ++i) {
      all.calls[i].call().head_count = 0;
    }
    at = next;
  }
}

template <class E>
void run_ragged_backward(const BackwardParams* calls, int64_t count) {
  const Workspace memory(static_cast<size_t>(count) * (sizeof(RaggedBackward<E>) + 3 * sizeof(LoopPart)));
  auto* records = reinterpret_cast<RaggedBackward<E>*>(memory.data());
  auto* parts = reinterpret_cast<LoopPart*>(records + count);
  int64_t flags_bytes = 0;
  double time = 0;
  for (int64_t i = 0; i < count; ++i) {
    records[i].b = calls + i;
    records[i].taken = 0;
    flags_bytes += search_bytes(calls[i].forward);
    time += expected_time(calls[i].forward, 1);
  }
  const int allowed = calls[0].forward.num_threads;
  const int threads = effective_threads(INT64_MAX, worthwhile_threads(time, allowed));
  RaggedBackwards<E> all{records, count, {parts, 0, 0}, threads, allowed, 0, 0, 0};
  const Workspace flags(static_cast<size_t>(flags_bytes));
  search_all(all, flags.data());
  plan_all(all);
  const Workspace scratch(static_cast<size_t>(threads * (all.thread_bytes + all.room_bytes) + all.wave_bytes));
  run_waves(all, scratch.data());
}

template <class E>
void backward(const BackwardParams* calls, int64_t count) {
  if (count == 1) {
    run_backward<E>(calls[0]);
    return;
  }
  for (int64_t first = 0; first < count; first += kCallsAtOnce) {
    run_ragged_backward<E>(calls + first, min64(count - first, kCallsAtOnce));
  }
}

}  // namespace
}  // namespace fastattn
