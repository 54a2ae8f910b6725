#include "cpu_features.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastattn {
namespace {

#if defined(__x86_64__)

struct CpuidResult {
  uint32_t eax, ebx, ecx, edx;
};

CpuidResult cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  CpuidResult r{};
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(uint32_t word, int index) { return ((word >> index) & 1U) != 0; }

// The register sets that the operating system saves on a context switch.
uint64_t enabled_state() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

constexpr long kTileData = 18;  // the state component of the AMX tile registers

// Whether Linux would hand out the AMX tile registers to a process that asks.
bool system_has_tiles() {
#if defined(__linux__)
  constexpr long kArchGetXcompSupp = 0x1021;
  uint64_t components = 0;
  return syscall(SYS_arch_prctl, kArchGetXcompSupp, &components) == 0 && ((components >> kTileData) & 1U) != 0;
#else
  return false;
#endif
}

void read_brand(char* brand) {
  if (cpuid(0x80000000U).eax < 0x80000004U) {
    return;
  }
  for (uint32_t part = 0; part < 3; ++part) {
    const CpuidResult r = cpuid(0x80000002U + part);
    std::memcpy(brand + 16 * part, &r, sizeof r);
  }
}

CpuFeatures detect() {
  constexpr uint64_t kYmm = 0x6;          // SSE and AVX state
  constexpr uint64_t kZmm = kYmm | 0xe0;  // opmask and both halves of the ZMM registers
  constexpr uint64_t kTiles = 0x60000;    // tile configuration and data
  CpuFeatures f{};
  read_brand(f.brand);
  const CpuidResult base = cpuid(1);
  const bool osxsave = bit(base.ecx, 27);
  const uint64_t state = osxsave ? enabled_state() : 0;
  const CpuidResult ext = cpuid(7, 0);
  const CpuidResult ext1 = cpuid(7, 1);
  const bool ymm = (state & kYmm) == kYmm;
  const bool zmm = (state & kZmm) == kZmm;
  f.avx2 = ymm && bit(base.ecx, 12) && bit(base.ecx, 29) && bit(ext.ebx, 5);
  f.avx512 = f.avx2 && zmm && bit(ext.ebx, 16) && bit(ext.ebx, 17) && bit(ext.ebx, 30) && bit(ext.ebx, 31);
  f.avx512_vnni = f.avx512 && bit(ext.ecx, 11);
  // Its tier uses all three. Cooper Lake has no VBMI, and would be left to the tier below anyway: see fast_bf16_dot.
  f.avx512_bf16 = f.avx512_vnni && bit(ext.ecx, 1) && bit(ext1.eax, 5);
  f.amx_bf16 =
      f.avx512_bf16 && (state & kTiles) == kTiles && bit(ext.edx, 22) && bit(ext.edx, 24) && system_has_tiles();
  f.amx_fp16 = f.amx_bf16 && bit(ext1.eax, 21);
  const CpuidResult vendor = cpuid(0);
  f.fast_bf16_dot = f.avx512_bf16 && std::memcmp(&vendor.ebx, "Auth", 4) == 0;  // AuthenticAMD
  return f;
}

#else

CpuFeatures detect() { return CpuFeatures{}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

bool request_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023;
  static const bool granted = syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace fastattn
