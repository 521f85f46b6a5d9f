#include "kernels.h"
namespace pbjax {
const Kernels* NeonKernels() { return nullptr; }
}  // namespace pbjax
