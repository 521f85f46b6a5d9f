// The table that runs everywhere.
#include "kernels.h"

namespace pbjax {
#include "common_kernels.h"
#include "generic_kernels.h"

const Kernels* PortableKernels() {
  static const Kernels kernels = {
      "portable", GenericUnpack, GenericDot, nullptr, nullptr, GenericValues, GenericFloatDot, nullptr, Quantize, Split, Sum,
      Combine,    ScaleOnly,     ScaleAdd,   FinishRow};
  return &kernels;
}

const Kernels* FindKernels(const char* name, size_t length) {
  const Kernels* const tables[] = {Avx512Kernels(), Avx2Kernels(), NeonKernels(), PortableKernels()};
  for (const Kernels* kernels : tables) {
    if (kernels == nullptr) continue;
    if (length == 0) return kernels;
    if (__builtin_strlen(kernels->name) == length && __builtin_memcmp(kernels->name, name, length) == 0) return kernels;
  }
  return nullptr;
}

}  // namespace pbjax
