// AVX2 and FMA: plain C++ for wider registers.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
namespace pbjax {
#include "common_kernels.h"
#include "generic_kernels.h"

const Kernels* Avx2Kernels() {
  static const Kernels kernels = {
      "avx2",  GenericUnpack, GenericDot, nullptr,   nullptr,  GenericValues, GenericFloatDot, nullptr,
      Quantize, Split,         Sum,        Combine,   ScaleOnly, ScaleAdd,      FinishRow};
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported ? &kernels : nullptr;
}

}  // namespace pbjax
#else
namespace pbjax {
const Kernels* Avx2Kernels() { return nullptr; }
}  // namespace pbjax
#endif
