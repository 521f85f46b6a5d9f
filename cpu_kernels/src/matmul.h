// The product of contract.py on one set of kernels.
#ifndef PBJAX_MATMUL_H_
#define PBJAX_MATMUL_H_

#include "kernels.h"
#include "parallel.h"
#include "problem.h"

namespace pbjax {

// Writes the whole of operands.y. Throws std::bad_alloc, never anything else.
void Matmul(const Problem& problem, const Operands& operands, const Kernels& kernels, Scheduler& scheduler);

}  // namespace pbjax

#endif  // PBJAX_MATMUL_H_
