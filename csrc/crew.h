// The worker threads that libgomp keeps for one calling thread, and whether it can have more.
//
// libgomp ends the process when it cannot start a thread. So before a region that needs more threads than there are, as
// many are started and ended again: under a limit on threads, on address space or on processes this fails here, where
// it does no harm, and the region makes do with fewer.
#pragma once

#include <atomic>
#include <chrono>
#include <climits>
#include <memory>

namespace fastattn {

class Crew {
 public:
  // The calling thread's.
  static Crew& mine() noexcept;

  // The largest team, the caller included, up to `wanted` for which there are threads or can be.
  int obtain(int wanted) noexcept { return workers() + 1 >= wanted && wanted <= limit_ ? wanted : enlarge(wanted); }

  int workers() const noexcept { return workers_ == nullptr ? 0 : workers_->load(std::memory_order_relaxed); }

  // Within a region: the worker calls this on its caller's crew and is counted until it ends.
  void enlist() noexcept;

  // After a region: OMP_THREAD_LIMIT and OMP_DYNAMIC may have made it smaller than asked for.
  void settle(int team, int formed) noexcept {
    if (formed < team) {
      keep_to(formed);
    }
  }

 private:
  using Clock = std::chrono::steady_clock;

  int enlarge(int wanted) noexcept;
  void keep_to(int limit) noexcept;

  // Counted by the workers themselves: libgomp does not tell, and ends those that a smaller team, torch's for one,
  // leaves over. Shared with them because they may outlive their caller.
  std::shared_ptr<std::atomic<int>> workers_;
  int limit_ = INT_MAX;         // what the last attempt came to, where that was less than was wanted ...
  Clock::time_point retry_at_;  // ... until then
};

}  // namespace fastattn
