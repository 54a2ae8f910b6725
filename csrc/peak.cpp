#include "peak.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <stdexcept>

#include "dispatch.h"
#include "parallel.h"
#include "workspace.h"

namespace fastattn {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr int kMaxThreads = 1024;  // as many as a call may be given, see _threads.py

struct PeakRun {
  PeakFn run;
  int64_t rounds;
  const uint64_t* buffer;
  int64_t words;             // of each thread's part of the buffer
  double work[kMaxThreads];  // a thread each
};

void run_fma(void* context, int64_t task, int /*thread*/) {
  auto& peak = *static_cast<PeakRun*>(context);
  peak.work[task] = peak.run(peak.rounds);
}

// Sums in eight chains, so that loads and not additions set the pace.
void run_read(void* context, int64_t task, int /*thread*/) {
  auto& peak = *static_cast<PeakRun*>(context);
  const uint64_t* from = peak.buffer + task * peak.words;
  uint64_t sum[8] = {};
  for (int64_t i = 0; i + 8 <= peak.words; i += 8) {
    for (int lane = 0; lane < 8; ++lane) {
      sum[lane] += from[i + lane];
    }
  }
  volatile uint64_t kept = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
  (void)kept;
  peak.work[task] = static_cast<double>(peak.words) * sizeof(uint64_t);
}

// The best of runs of about two milliseconds or a pass over the buffer, in 1e9 units of work a second.
double best_rate(PeakRun& peak, TaskFn task, int threads, double seconds) {
  double best = 0;
  const auto start = Clock::now();
  do {
    const auto begin = Clock::now();
    parallel_for(threads, threads, task, &peak);
    const double elapsed = seconds_since(begin);
    double work = 0;
    for (int i = 0; i < threads; ++i) {
      work += peak.work[i];
    }
    best = std::max(best, work / elapsed * 1e-9);
  } while (seconds_since(start) < seconds);
  return best;
}

double measure_fma(PeakFn run, int threads, double seconds) {
  if (run == nullptr) {
    return 0;
  }
  PeakRun peak{};
  peak.run = run;
  constexpr int64_t kCalibration = 20000;  // half a millisecond at most, long beside the clock
  const auto begin = Clock::now();
  run(kCalibration);
  const double once = std::max(seconds_since(begin), 1e-7);
  peak.rounds = std::max<int64_t>(kCalibration, static_cast<int64_t>(kCalibration * 2e-3 / once));
  return best_rate(peak, run_fma, threads, seconds);
}

double measure_read(int threads, double seconds) {
  constexpr int64_t kBytes = int64_t{256} << 20;  // past any last-level cache that two cores get a share of
  const Workspace buffer(kBytes);
  auto* words = reinterpret_cast<uint64_t*>(buffer.data());
  constexpr int64_t kWords = kBytes / static_cast<int64_t>(sizeof(uint64_t));
  std::fill(words, words + kWords, uint64_t{1});
  PeakRun peak{};
  peak.buffer = words;
  peak.words = kWords / threads;
  return best_rate(peak, run_read, threads, seconds);
}

}  // namespace

double read_once(const void* from, int64_t bytes, int num_threads) {
  const int threads = std::min(effective_threads(num_threads, num_threads), kMaxThreads);
  PeakRun peak{};
  peak.buffer = static_cast<const uint64_t*>(from);
  peak.words = bytes / static_cast<int64_t>(sizeof(uint64_t)) / threads;
  const auto begin = Clock::now();
  parallel_for(threads, threads, run_read, &peak);
  return seconds_since(begin);
}

double measure_peak(const std::string& kind, int num_threads, double seconds) {
  const int threads = std::min(effective_threads(num_threads, num_threads), kMaxThreads);
  if (kind == "fma_f32") {
    return measure_fma(kernels().peak_fma_f32, threads, seconds);
  }
  if (kind == "fma_f64") {
    return measure_fma(kernels().peak_fma_f64, threads, seconds);
  }
  if (kind == "dot_bf16") {
    return measure_fma(kernels().peak_dot_bf16, threads, seconds);
  }
  if (kind == "read") {
    return measure_read(threads, seconds);
  }
  throw std::invalid_argument("kind '" + kind + "' is unknown; expected fma_f32, fma_f64, dot_bf16 or read");
}

}  // namespace fastattn
