// Loops of many calls as one, so that the short and the long ones run side by side.
#pragma once

#include "algorithm/engine.h"
#include "parallel.h"

namespace fastattn {
namespace {

// How many calls are made ready at once, which bounds what is kept of each.
constexpr int64_t kCallsAtOnce = 512;

struct LoopPart {
  int64_t begin;  // its first task among those of all
  TaskFn run;
  void* context;
};

// A loop of loops, whose tasks are handed out part by part in the order in which these were added.
struct MergedLoop {
  LoopPart* parts;
  int64_t count;
  int64_t tasks;

  void add(int64_t more, TaskFn run, void* context) {
    if (more > 0) {
      parts[count++] = {tasks, run, context};
      tasks += more;
    }
  }

  // Runs what was added, and is empty afterwards.
  void run(int threads, int allowed) {
    parallel_for(tasks, threads, run_part, this, allowed);
    count = tasks = 0;
  }

  static void run_part(void* opaque, int64_t task, int thread) {
    const auto& loop = *static_cast<const MergedLoop*>(opaque);
    int64_t low = 0;
    int64_t high = loop.count;  // the part is one of [low, high)
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (loop.parts[middle].begin <= task ? low : high) = middle;
    }
    const LoopPart& part = loop.parts[low];
    part.run(part.context, task - part.begin, thread);
  }
};

}  // namespace
}  // namespace fastattn
