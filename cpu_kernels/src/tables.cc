// Which tables this machine can run. The files of kernels are compiled for machines that have their instructions, and with
// them the functions that fill in the tables: they are called on no other machine, and the questions are asked here.
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pbjax {
namespace {

#if defined(__x86_64__)

bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool HasAvx512Base() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool HasAvx512Vnni() { return HasAvx512Base() && __builtin_cpu_supports("avx512vnni"); }

bool HasAvx512() { return HasAvx512Vnni() && __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx512vbmi"); }

// Whether the machine has tiles of bytes, and Linux lets this process use them, which it has to be asked.
bool HasTiles() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of asm/prctl.h
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kTile) || !(edx & kInt8)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#elif defined(__aarch64__)

bool HasDotProducts() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP of asm/hwcap.h
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#else
  return true;  // every Apple processor of this architecture
#endif
}

#endif

}  // namespace

int FindTables(const Kernels** tables) {
  int count = 0;
  [[maybe_unused]] const auto add = [&](bool supported, const Kernels* (*table)()) {
    const Kernels* kernels = supported ? table() : nullptr;
    if (kernels != nullptr) tables[count++] = kernels;
  };
#if defined(__x86_64__)
  // Linux is asked where there is a use for tiles only: a process that may use them has larger frames of signals.
  static const bool tiles = HasAvx512() && AmxKernels() != nullptr && HasTiles();
  add(tiles, AmxKernels);
  add(HasAvx512(), Avx512Kernels);
  add(HasAvx512Vnni(), Avx512VnniKernels);
  add(HasAvx512Base(), Avx512BaseKernels);
  add(HasAvx2(), Avx2Kernels);
#elif defined(__aarch64__)
  add(HasDotProducts(), NeonKernels);
#endif
  tables[count++] = PortableKernels();
  return count;
}

const Kernels* FindKernels(const char* name, size_t length) {
  const Kernels* tables[kMaxTables];
  const int count = FindTables(tables);
  for (int i = 0; i < count; ++i) {
    const char* its = tables[i]->name;
    if (length == 0 || (__builtin_strlen(its) == length && __builtin_memcmp(its, name, length) == 0)) return tables[i];
  }
  return nullptr;
}

}  // namespace pbjax
