// What this CPU and this operating system allow: an instruction set counts only when CPUID names it *and* the
// system saves its registers (XCR0), else its first use would fault.
#pragma once

namespace fastattn {

struct CpuFeatures {
  bool avx2;         // with FMA and F16C, as the avx2 tier needs
  bool avx512;       // F, BW, DQ, VL
  bool avx512_bf16;  // VDPBF16PS, with VNNI and VBMI
  bool avx512_vnni;
  bool amx_bf16;       // tiles, which the system hands out to processes that ask: see request_tiles()
  bool amx_fp16;       // the same for float16
  bool fast_bf16_dot;  // VDPBF16PS does more work a cycle than FMA (AMD); on Intel it does half
  char brand[49];
};

const CpuFeatures& cpu_features();

// Asks the operating system for the AMX tile registers, once. For the whole process that makes signal frames larger, so
// it is left until a tier is chosen that uses them; Linux refuses where a thread's signal stack is too small for that.
bool request_tiles();

}  // namespace fastattn
