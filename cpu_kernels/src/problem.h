// What one product is: the static facts and operands of pallas_kernels/bit_matmul/contract.py, as plain C++.
#ifndef PBJAX_PROBLEM_H_
#define PBJAX_PROBLEM_H_

#include <stdint.h>

namespace pbjax {

constexpr int64_t kWordBits = 32;
constexpr int kLimbBits = 8;
constexpr int kMaxLimbs = 3;           // 24 activation bits
constexpr int kMaxBits = 16;
constexpr int kNumScales = 4;
constexpr int64_t kMaxExactK = 32768;  // int32 sums this many products of two 8-bit limbs

enum class RowType { kCodes, kFloat32, kBFloat16, kFloat16 };

// Rows of activations times packed words, see contract.py for shapes and meaning.
struct Problem {
  int64_t m, k, n, bits;
  int64_t group_size;   // 0: one group of all k
  int activation_bits;  // 0: float activations
  RowType row_type;     // kCodes: fixed-point codes come in and the unit of the row stays with the caller
  bool prefixes;        // every number of bitlayers up to counts[0], instead of counts[row] for each row

  int64_t num_words() const { return (k + kWordBits - 1) / kWordBits; }
  int64_t words_per_group() const { return group_size == 0 ? num_words() : group_size / kWordBits; }
  int64_t groups() const { return group_size == 0 ? 1 : (k + group_size - 1) / group_size; }
  int limbs() const { return (activation_bits + kLimbBits - 1) / kLimbBits; }
};

struct Operands {
  const void* x;         // [m, k] of row_type
  const uint32_t* words; // [bits, num_words, n]
  const float* scale;    // [min(bits, 4), groups, n]
  const int32_t* counts; // [m], or [1] with prefixes
  float* y;              // [m, n], or [bits, m, n] with prefixes
};

}  // namespace pbjax

#endif  // PBJAX_PROBLEM_H_
