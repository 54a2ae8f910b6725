#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu_features.h"

namespace fastattn {
namespace {

struct Tier {
  const char* name;
  void (*fill)(KernelTable&);
  bool (*present)(const CpuFeatures&);
  // Whether the automatic choice takes it. A tier that is present but slower than the one below is only taken by name.
  bool (*preferred)(const CpuFeatures&);
  // Asks the operating system for registers that it hands out on request: not before the tier is chosen or listed.
  bool (*granted)();
};

bool always(const CpuFeatures& /*unused*/) { return true; }
bool freely() { return true; }

// Weakest first; a tier stands on the preferred ones above it in this list that the CPU has.
const Tier kTiers[] = {
    {"scalar", register_scalar, always, always, freely},
#ifdef FASTATTN_HAVE_AVX2
    {"avx2", register_avx2, [](const CpuFeatures& f) { return f.avx2; }, always, freely},
#endif
#ifdef FASTATTN_HAVE_AVX512
    {"avx512", register_avx512, [](const CpuFeatures& f) { return f.avx512; }, always, freely},
#endif
#ifdef FASTATTN_HAVE_AVX512_BF16
    {"avx512_bf16", register_avx512_bf16, [](const CpuFeatures& f) { return f.avx512_bf16; },
     [](const CpuFeatures& f) { return f.fast_bf16_dot; }, freely},
#endif
#ifdef FASTATTN_HAVE_AMX_BF16
    {"amx_bf16", register_amx_bf16, [](const CpuFeatures& f) { return f.amx_bf16; }, always, request_tiles},
#endif
#ifdef FASTATTN_HAVE_AMX_FP16
    {"amx_fp16", register_amx_fp16, [](const CpuFeatures& f) { return f.amx_fp16; }, always, request_tiles},
#endif
};
constexpr int kTierCount = sizeof(kTiers) / sizeof(kTiers[0]);

// The table of every tier of this machine, each filled from the weakest tier up to it.
struct Tables {
  KernelTable table[kTierCount];
  bool present[kTierCount];
  bool preferred[kTierCount];

  Tables() {
    const CpuFeatures& cpu = cpu_features();
    KernelTable running{};
    for (int i = 0; i < kTierCount; ++i) {
      present[i] = kTiers[i].present(cpu);
      preferred[i] = present[i] && kTiers[i].preferred(cpu);
      if (!present[i]) {
        continue;
      }
      table[i] = running;
      kTiers[i].fill(table[i]);
      if (preferred[i]) {
        running = table[i];
      }
    }
  }
};

const Tables& tables() {
  static const Tables all;
  return all;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) {
    text += (text.empty() ? "" : ", ") + name;
  }
  return text;
}

int best_tier() {
  int tier = kTierCount - 1;
  while (tier > 0 && !(tables().preferred[tier] && kTiers[tier].granted())) {
    --tier;
  }
  return tier;
}

int find_tier(const std::string& name) {
  for (int i = 0; i < kTierCount; ++i) {
    if (name == kTiers[i].name && tables().present[i] && kTiers[i].granted()) {
      return i;
    }
  }
  return -1;
}

int default_tier() {
  const char* forced = std::getenv("FASTATTN_ISA");
  if (forced == nullptr || *forced == '\0') {
    return best_tier();
  }
  const int tier = find_tier(forced);
  if (tier < 0) {
    throw std::runtime_error(
        "FASTATTN_ISA='" + std::string(forced) +
        "' is not an instruction set of this machine and build; available: " + join(available_isas()));
  }
  return tier;
}

std::atomic<int> g_selected{-1};

int selected_tier() {
  int tier = g_selected.load(std::memory_order_relaxed);
  if (tier < 0) {
    tier = default_tier();
    g_selected.store(tier, std::memory_order_relaxed);
  }
  return tier;
}

}  // namespace

ForwardFn forward_kernel(const AttentionParams& params) {
  const bool plain = params.dtype == DType::float64 && params.kv_dtype != DType::float64;
  const KernelTable& table = plain ? tables().table[0] : kernels();
  const auto dtype = static_cast<int>(params.dtype);
  const bool few = params.kv_dtype != params.dtype && params.seqlen_q <= few_queries(params.dtype);
  return few ? table.quantised[dtype] : table.forward[dtype].run;
}

const KernelTable& kernels() { return tables().table[selected_tier()]; }

const char* selected_isa() { return kTiers[selected_tier()].name; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Tier& tier : kTiers) {
    names.emplace_back(tier.name);
  }
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kTierCount; ++i) {
    if (tables().present[i] && kTiers[i].granted()) {
      names.emplace_back(kTiers[i].name);
    }
  }
  return names;
}

void select_isa(const std::string& name) {
  if (name.empty()) {
    g_selected.store(default_tier());
    return;
  }
  const int tier = find_tier(name);
  if (tier < 0) {
    throw std::invalid_argument("isa '" + name +
                                "' is not available on this machine; available: " + join(available_isas()));
  }
  g_selected.store(tier);
}

}  // namespace fastattn
