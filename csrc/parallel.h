// The only room that names OpenMP.
#pragma once

#include <chrono>
#include <cstdint>

namespace fastattn {

// One task of a parallel loop: `thread` is in [0, num_threads) and no two tasks run at once under the same number.
using TaskFn = void (*)(void* context, int64_t task, int thread);

// Runs tasks 0 .. tasks-1, handed out in order to whichever thread is free. Tasks must not throw.
// `allowed`, if larger than `num_threads`, is how many threads the call may use: with teams of one size libgomp keeps
// its threads. Where they cannot be had, fewer do it, or the calling thread alone. A function pointer and not a
// std::function: its instantiations would be weak symbols in every ISA object.
void parallel_for(int64_t tasks, int num_threads, TaskFn run, void* context, int allowed = 0) noexcept;

// How many threads a loop of `tasks` tasks has work for when `wanted` are asked for: scratch for as many is enough.
int effective_threads(int64_t tasks, int wanted) noexcept;

// Whether loops run on this thread alone: it came out of fork(), and its threads did not, or is of a parallel region.
bool runs_alone() noexcept;

// Long calls can be left early. While an Interruptible is alive, loops started on its thread ask it every now and then,
// between two tasks, whether to drop those not begun yet; loops that follow one which was stopped do not start.
class Interruptible {
 public:
  using AskFn = bool (*)(void* context);  // true: stop

  Interruptible(AskFn ask, void* context) noexcept;
  ~Interruptible();
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;

  bool stopped() const noexcept { return stopped_; }
  bool asked_to_stop() noexcept;  // asks only if some time has passed since it last did

 private:
  using Clock = std::chrono::steady_clock;

  AskFn ask_;
  void* context_;
  Interruptible* outer_;  // of the call that a signal handler interrupted to make this one
  Clock::time_point looked_at_;
  Clock::time_point ask_at_;
  int tasks_to_look_ = 2;  // not before the first task, which would pass for a short one
  bool stopped_ = false;
};

// Keeps forked children from waiting for threads that fork() did not copy. Called once, at load.
void watch_forks();

// CPUs this process may run on.
int available_cpus();

// The OpenMP version the runtime implements, as yyyymm.
int openmp_version();

}  // namespace fastattn
