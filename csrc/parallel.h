// The only room that names OpenMP.
#pragma once

#include <cstdint>

namespace fastattn {

// One task of a parallel loop: `thread` is in [0, num_threads) and no two tasks run at once under the same number.
using TaskFn = void (*)(void* context, int64_t task, int thread);

// Runs tasks 0 .. tasks-1, handed out in order to whichever thread is free. Tasks must not throw.
// A function pointer and not a std::function: its instantiations would be weak symbols in every ISA object.
void parallel_for(int64_t tasks, int num_threads, TaskFn run, void* context) noexcept;

// How many threads a loop of `tasks` tasks uses when `wanted` are asked for (1 in a forked child).
int effective_threads(int64_t tasks, int wanted) noexcept;

// Keeps forked children from waiting for threads that fork() did not copy. Called once, at load.
void watch_forks();

// CPUs this process may run on.
int available_cpus();

// The OpenMP version the runtime implements, as yyyymm.
int openmp_version();

}  // namespace fastattn
