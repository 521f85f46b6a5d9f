// AVX-512 and the tiles of AMX: Sapphire Rapids and later.
#if defined(__AMX_INT8__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Whether the machine has tiles of bytes, and Linux lets this process use them, which it has to be asked.
bool HasTiles() {
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of asm/prctl.h
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kTile) || !(edx & kInt8)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

#define PBJAX_COMPILED
#endif
#define PBJAX_TABLE AmxKernels
#define PBJAX_NAME "avx512_amx"
#define PBJAX_SUPPORTED (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx512vbmi") && HasTiles())
#define PBJAX_TILES
#include "avx512_table.h"
