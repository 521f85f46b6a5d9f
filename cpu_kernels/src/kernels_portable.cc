// The table that runs everywhere.
#include "kernels.h"

#include <initializer_list>

namespace pbjax {
#include "common_kernels.h"
#include "generic_kernels.h"

const Kernels* PortableKernels() {
  static const Kernels kernels = [] {
    Kernels table = CommonKernels("portable");
    table.unpack = GenericUnpack;
    table.dot = GenericDot;
    table.values = GenericValues;
    table.float_dot = GenericFloatDot;
    return table;
  }();
  return &kernels;
}

int FindTables(const Kernels** tables) {
  int count = 0;
  for (const Kernels* kernels : {AmxKernels(), Avx512Kernels(), Avx512VnniKernels(), Avx512BaseKernels(), Avx2Kernels(),
                                 NeonKernels(), PortableKernels()}) {
    if (kernels != nullptr) tables[count++] = kernels;
  }
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
