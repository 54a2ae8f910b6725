#include "crew.h"

#include <pthread.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace fastattn {
namespace {

// A server short of threads for a moment gets them back soon, and trying costs microseconds a thread.
constexpr auto kRetryAfter = std::chrono::seconds(1);

// What libgomp allocates for a team is within this: 1 KiB a thread, and some for the team.
constexpr size_t kHeapPerThread = 1024;
constexpr size_t kHeap = size_t{64} << 10;

// The stack size that libgomp gives its threads, 0 for the system's default: a number with B, K, M or G, alone in KiB.
size_t parse_stack_size(const char* text) {
  char* end = nullptr;
  const size_t number = text == nullptr ? 0 : std::strtoull(text, &end, 10);
  if (number == 0) {
    return 0;
  }
  while (std::isspace(static_cast<unsigned char>(*end)) != 0) {
    ++end;
  }
  switch (std::tolower(static_cast<unsigned char>(*end))) {
    case 'b':
      return number;
    case 'm':
      return number << 20;
    case 'g':
      return number << 30;
    default:
      return number << 10;
  }
}

size_t stack_size() {
  static const size_t size = std::max(parse_stack_size(std::getenv("OMP_STACKSIZE")),  // libgomp reads them once too
                                      parse_stack_size(std::getenv("GOMP_STACKSIZE")));
  return size;
}

void* wait_for_gate(void* gate) {
  const std::lock_guard<std::mutex> lock(*static_cast<std::mutex*>(gate));
  return nullptr;
}

// How many of `count` threads can be there at once, beside the memory that a team takes.
int start_and_end(int count) {
  std::vector<pthread_t> threads;
  threads.reserve(static_cast<size_t>(count));
  const std::unique_ptr<char[]> heap(new char[kHeap + static_cast<size_t>(count) * kHeapPerThread]);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  if (stack_size() > 0) {
    pthread_attr_setstacksize(&attributes, stack_size());  // below the minimum: refused, here as by libgomp
  }
  std::mutex gate;
  gate.lock();
  pthread_t thread;
  while (static_cast<int>(threads.size()) < count && pthread_create(&thread, &attributes, wait_for_gate, &gate) == 0) {
    threads.push_back(thread);
  }
  gate.unlock();
  for (const pthread_t started : threads) {
    pthread_join(started, nullptr);
  }
  pthread_attr_destroy(&attributes);
  return static_cast<int>(threads.size());
}

// A worker's place in the crew that it belongs to.
struct Membership {
  std::shared_ptr<std::atomic<int>> workers;
  ~Membership() { leave(); }
  void leave() {
    if (workers != nullptr) {
      workers->fetch_sub(1);
    }
  }
};

thread_local Membership t_membership;

}  // namespace

Crew& Crew::mine() noexcept {
  static thread_local Crew crew;
  return crew;
}

void Crew::enlist() noexcept {
  if (t_membership.workers != workers_) {
    t_membership.leave();
    t_membership.workers = workers_;
    workers_->fetch_add(1);
  }
}

int Crew::enlarge(int wanted) noexcept {
  if (wanted > limit_) {
    if (Clock::now() < retry_at_) {
      wanted = limit_;
    } else {
      limit_ = INT_MAX;
    }
  }
  try {
    if (workers_ == nullptr) {
      workers_ = std::make_shared<std::atomic<int>>(0);
    }
    const int there = workers();
    const int missing = wanted - 1 - there;
    const int started = missing > 0 ? start_and_end(missing) : 0;
    if (started < missing) {
      keep_to(1 + there + started / 2);  // half of the last threads: the rest of the process needs some too
      return limit_;
    }
    return wanted;
  } catch (const std::bad_alloc&) {
    keep_to(1);
    return 1;
  }
}

void Crew::keep_to(int limit) noexcept {
  limit_ = limit;
  retry_at_ = Clock::now() + kRetryAfter;
}

}  // namespace fastattn
