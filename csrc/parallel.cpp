#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

#include "crew.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace fastattn {
namespace {

// libgomp's threads do not survive fork(): the next region of the thread that forked would wait for those that are not
// there. Threads that the child starts have none to wait for.
thread_local bool t_forked = false;

thread_local Interruptible* t_interruptible = nullptr;

// Soon enough for somebody who waits after Ctrl-C; seldom enough where another thread holds the interpreter, for 5 ms.
constexpr auto kAskInterval = std::chrono::milliseconds(200);

// Looking at the clock takes a tenth of the shortest tasks: while they are short, it is looked at every eighth.
constexpr auto kShortTask = std::chrono::milliseconds(1);
constexpr int kShortTasks = 8;

struct Loop {
  int64_t tasks;
  TaskFn run;
  void* context;
  std::atomic<int64_t> next{0};
};

void take_tasks(Loop& loop, int thread, Interruptible* interruptible) {
  for (int64_t task = loop.next.fetch_add(1); task < loop.tasks; task = loop.next.fetch_add(1)) {
    if (interruptible != nullptr && interruptible->asked_to_stop()) {
      loop.next.store(loop.tasks);
      return;
    }
    loop.run(loop.context, task, thread);
  }
}

// At least the CPUs' share of what may be used, tasks or not: libgomp ends the threads that a smaller team leaves over,
// and torch always takes its full one. Regions of 16 and 4 threads in turn took 366 us a pair, of 16 and 16 103 us.
int team_size(int members, int wanted) {
  static const int cpus = available_cpus();
  return std::max(members, std::min(wanted, cpus));
}

// libgomp keeps a record of each thread that a region starts, some hundred bytes, on its caller's stack, which may be
// as small as 128 KiB: larger teams grow in steps.
constexpr int kThreadsAtOnce = 128;

void grow_in_steps(Crew& crew, int team) {
  for (int size = 1 + crew.workers() + kThreadsAtOnce; size < team; size += kThreadsAtOnce) {
#pragma omp parallel num_threads(size)
    if (omp_get_thread_num() != 0) {
      crew.enlist();
    }
  }
}

}  // namespace

bool runs_alone() noexcept { return t_forked || omp_in_parallel() != 0; }

int effective_threads(int64_t tasks, int wanted) noexcept {
  if (runs_alone()) {
    return 1;
  }
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(tasks, wanted)));
}

void parallel_for(int64_t tasks, int num_threads, TaskFn run, void* context, int allowed) noexcept {
  Interruptible* const interruptible = t_interruptible;
  if (interruptible != nullptr && interruptible->stopped()) {
    return;
  }
  Loop loop{tasks, run, context};
  const int members = effective_threads(tasks, num_threads);
  Crew& crew = Crew::mine();
  const int team = members > 1 ? crew.obtain(team_size(members, std::max(num_threads, allowed))) : 1;
  if (team == 1) {
    take_tasks(loop, 0, interruptible);
    return;
  }
  grow_in_steps(crew, team);
  int formed = 1;
#pragma omp parallel num_threads(team)
  {
    const int thread = omp_get_thread_num();
    if (thread == 0) {
      formed = omp_get_num_threads();
    } else {
      crew.enlist();
    }
    if (thread < members) {
      take_tasks(loop, thread, thread == 0 ? interruptible : nullptr);
    }
  }
  crew.settle(team, formed);
}

Interruptible::Interruptible(AskFn ask, void* context) noexcept
    : ask_(ask),
      context_(context),
      outer_(t_interruptible),
      looked_at_(Clock::now()),
      ask_at_(looked_at_ + kAskInterval) {
  t_interruptible = this;
}

Interruptible::~Interruptible() { t_interruptible = outer_; }

bool Interruptible::asked_to_stop() noexcept {
  if (--tasks_to_look_ > 0) {
    return stopped_;
  }
  const Clock::time_point now = Clock::now();
  tasks_to_look_ = now - looked_at_ < kShortTask ? kShortTasks : 1;
  looked_at_ = now;
  if (now >= ask_at_) {
    stopped_ = ask_(context_);
    ask_at_ = Clock::now() + kAskInterval;
  }
  return stopped_;
}

void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { t_forked = true; });
}

// Of the two counts the larger: with OMP_PROC_BIND libgomp ties the calling thread to one CPU of those it found.
int available_cpus() {
  int cpus = omp_get_num_procs();
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    cpus = std::max(cpus, CPU_COUNT(&set));
  }
#endif
  return std::max(1, cpus);
}

int openmp_version() { return _OPENMP; }

}  // namespace fastattn
