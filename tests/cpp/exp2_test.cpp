// exp2 of every tier at every float32, and at a dense sample of doubles. Prints a line for each variant, and exits with
// 1 if a result is out of bounds: within 2 units of the last place (1e-4 relatively for bfloat16) on [-126, 128), 0 or
// within 2^-126 below, +inf from 128 on, exactly 1 at 0 and 0 at -inf, NaN for every NaN. exp2_test [STEP] takes every
// STEPth chunk of 4096 numbers.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "cpu_features.h"
#include "exp2_tier.h"

namespace exp2_test {
#define EXP2_TIER(name) extern const Tier tier_##name;
#include "exp2_tiers.inc"
#undef EXP2_TIER
}  // namespace exp2_test

namespace {

using namespace exp2_test;

struct Entry {
  const Tier* tier;
  bool present;
};

// Nothing here but vector registers is used, so that an AMX tier's exponential runs wherever AVX512_BF16 does.
bool runs_here(const char* name) {
  const fastattn::CpuFeatures& cpu = fastattn::cpu_features();
  if (std::strcmp(name, "avx2") == 0) {
    return cpu.avx2;
  }
  return std::strcmp(name, "avx512") == 0 ? cpu.avx512 : cpu.avx512_bf16;
}

std::vector<Entry> all_tiers() {
  std::vector<Entry> found;
#define EXP2_TIER(name) found.push_back({&tier_##name, runs_here(#name)});
#include "exp2_tiers.inc"
#undef EXP2_TIER
  return found;
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Chunk {
  alignas(64) float x[kChunk];
  alignas(64) double exact[kChunk];
  Range range;
};

// Chunks begin at multiples of 4096: at -126 and 128 among others, so that one is of one range. -126 itself is looked
// at among the special values.
void fill(Chunk& chunk, uint32_t start) {
  for (int i = 0; i < kChunk; ++i) {
    chunk.x[i] = from_bits(start + static_cast<uint32_t>(i));
  }
  const float last = chunk.x[kChunk - 1];
  chunk.range = std::isnan(last) ? Range::nan : last < -126 ? Range::below : last >= 128 ? Range::above : Range::normal;
  for (int i = 0; i < kChunk; ++i) {
    const double x = chunk.x[i];
    // As exact as a double holds: the square of the logarithm of 2 times 2^-54 is lost in it.
    const bool tiny = std::fabs(last) < 0x1p-27;
    chunk.exact[i] = chunk.range == Range::normal || x > -160 ? (tiny ? 1 + x * M_LN2 : std::exp2(x)) : 0;
  }
}

void fold(Worst& into, const Worst& other) {
  if (other.wrong != 0 && into.wrong == 0) {
    into.first = other.first;
  }
  into.wrong += other.wrong;
  into.error = std::max(into.error, other.error);
}

// One number of a range of its own, NaN and infinities among them.
float power_of(const Variant& variant, float x) {
  alignas(64) float in[kChunk];
  alignas(64) float out[kChunk];
  for (float& each : in) {
    each = x;
  }
  variant.compute(in, out);
  return out[kChunk - 1];
}

int special_values(const Tier& tier, const Variant& variant) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const bool exact = !variant.relative;
  int wrong = 0;
  const auto expect = [&](float x, bool right) {
    if (!right) {
      std::printf("%s %s: wrong at %g: %g\n", tier.name, variant.name, x, power_of(variant, x));
      ++wrong;
    }
  };
  expect(-kInf, power_of(variant, -kInf) == 0);
  expect(kInf, power_of(variant, kInf) == kInf);
  expect(0.0F, std::fabs(power_of(variant, 0.0F) - 1) <= (exact ? 0 : variant.bound));
  expect(-0.0F, std::fabs(power_of(variant, -0.0F) - 1) <= (exact ? 0 : variant.bound));
  expect(-126.0F, std::fabs(power_of(variant, -126.0F) * 0x1p126 - 1) <= (exact ? 0 : variant.bound));
  expect(std::nanf(""), std::isnan(power_of(variant, std::nanf(""))));
  return wrong;
}

int check_floats(const std::vector<Entry>& tiers, uint32_t step, unsigned threads) {
  struct Job {
    const Tier* tier;
    const Variant* variant;
    Worst worst;
  };
  std::vector<Job> jobs;
  for (const Entry& entry : tiers) {
    for (int i = 0; entry.present && i < entry.tier->count; ++i) {
      jobs.push_back({entry.tier, &entry.tier->variants[i], {}});
    }
  }
  constexpr uint32_t kChunks = (uint64_t{1} << 32) / kChunk;
  std::atomic<uint32_t> next{0};
  std::atomic<uint64_t> seen{0};
  std::vector<std::vector<Worst>> found(threads, std::vector<Worst>(jobs.size()));
  std::vector<std::thread> pool;
  for (unsigned t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      Chunk chunk;
      for (uint32_t index; (index = next.fetch_add(step)) < kChunks;) {
        fill(chunk, index * kChunk);
        // The infinities start chunks of NaNs, and are special values.
        chunk.x[0] = std::isinf(chunk.x[0]) ? chunk.x[1] : chunk.x[0];
        for (size_t j = 0; j < jobs.size(); ++j) {
          jobs[j].variant->check(chunk.x, chunk.exact, chunk.range, &found[t][j]);
        }
        seen += kChunk;
      }
    });
  }
  for (std::thread& thread : pool) {
    thread.join();
  }
  int failures = 0;
  for (size_t j = 0; j < jobs.size(); ++j) {
    for (const auto& of_thread : found) {
      fold(jobs[j].worst, of_thread[j]);
    }
    const Worst& worst = jobs[j].worst;
    const Variant& variant = *jobs[j].variant;
    std::printf("%s %s: %.3g %s at most, %lld of %llu out of bounds", jobs[j].tier->name, variant.name, worst.error,
                variant.relative ? "relatively" : "ulp", static_cast<long long>(worst.wrong),
                static_cast<unsigned long long>(seen.load()));
    std::printf(worst.wrong != 0 ? ", at %.9g for one\n" : "\n", worst.first);
    failures += (worst.wrong != 0) + special_values(*jobs[j].tier, variant);
  }
  return failures;
}

// Errors in units of the last place of a double, over points a chunk at a time.
int check_doubles(const Tier& tier, int chunks) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> far(-1022, 1024);
  std::uniform_real_distribution<double> near_zero(-1, 1);
  alignas(64) double x[kChunk];
  alignas(64) double y[kChunk];
  double worst = 0;
  int wrong = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    for (int i = 0; i < kChunk; ++i) {
      x[i] = i % 2 == 0 ? far(random) : near_zero(random);
    }
    x[0] = 0;
    x[2] = -1022;
    x[4] = std::nextafter(1024.0, 0);
    x[6] = -1 + chunk;  // whole numbers
    tier.compute_double(x, y);
    for (int i = 0; i < kChunk; ++i) {
      const long double exact = exp2l(static_cast<long double>(x[i]));
      const double error = static_cast<double>(fabsl(y[i] - exact) / (exp2l(floorl(log2l(exact))) * 0x1p-52L));
      worst = std::max(worst, error);
      wrong += !(error <= 2);
    }
    wrong += y[0] != 1;
  }
  const double special[][2] = {{-kInf, 0}, {kInf, kInf}, {1024, kInf}, {1e300, kInf}, {-1e300, 0}, {-1200, 0}};
  for (const auto& pair : special) {
    std::fill(x, x + kChunk, pair[0]);
    tier.compute_double(x, y);
    wrong += y[0] != pair[1];
  }
  std::fill(x, x + kChunk, kNan);
  tier.compute_double(x, y);
  wrong += !std::isnan(y[0]);
  std::printf("%s exp2, double: %.3g ulp at most, %d of %d out of bounds\n", tier.name, worst, wrong, chunks * kChunk);
  return wrong != 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int step = argc > 1 ? std::atoi(argv[1]) : 1;
  if (step < 1) {
    std::fprintf(stderr, "usage: %s [STEP]\n", argv[0]);
    return 2;
  }
  const std::vector<Entry> tiers = all_tiers();
  int failures = check_floats(tiers, static_cast<uint32_t>(step), std::max(1U, std::thread::hardware_concurrency()));
  for (const Entry& entry : tiers) {
    if (entry.present) {
      failures += check_doubles(*entry.tier, step == 1 ? 256 : 16);
    } else {
      std::printf("%s: not run, this CPU lacks it\n", entry.tier->name);
    }
  }
  return failures == 0 ? 0 : 1;
}
