// The table that runs everywhere.
#include "kernels.h"

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

}  // namespace pbjax
