#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

#if defined(__linux__)
#include <sched.h>
#endif

namespace fastattn {
namespace {

// libgomp's pool does not survive fork(): a child's first region would wait for threads that are not there.
std::atomic<bool> g_forked_child{false};

void mark_child() { g_forked_child.store(true); }

}  // namespace

int effective_threads(int64_t tasks, int wanted) noexcept {
  if (g_forked_child.load(std::memory_order_relaxed)) {
    return 1;
  }
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(tasks, wanted)));
}

void parallel_for(int64_t tasks, int num_threads, TaskFn run, void* context) noexcept {
  const int threads = effective_threads(tasks, num_threads);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) {
      run(context, task, 0);
    }
    return;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) {
      run(context, task, thread);
    }
  }
}

void watch_forks() { pthread_atfork(nullptr, nullptr, mark_child); }

int available_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    return std::max(1, CPU_COUNT(&set));
  }
#endif
  return std::max(1, omp_get_num_procs());
}

int openmp_version() { return _OPENMP; }

}  // namespace fastattn
