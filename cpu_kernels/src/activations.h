// Rows of activations as the kernels take them.
#ifndef PBJAX_ACTIVATIONS_H_
#define PBJAX_ACTIVATIONS_H_

#include <stdint.h>

#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "problem.h"
#include "scratch.h"

namespace pbjax {

// Consecutive words of one group whose products int32 sums exactly.
struct Segment {
  int64_t group, start, stop;  // words
  bool first, last;            // of its group
};

std::vector<Segment> MakeSegments(const Problem& problem);

// The activations of a panel of rows, in the order in which tasks take them.
struct Panel {
  int64_t rows;
  const int64_t* source;    // [rows]: row of x and y
  const int32_t* counts;    // [rows], ascending; unused with prefixes
  int64_t limb_stride;      // of limbs, in bytes: k, padded. Not a power of two, so that no rows compete for a cache set
  uint8_t* limbs;           // [rows][limbs][limb_stride]
  int32_t* limb_sums;       // [rows][segments][limbs]
  float* values;            // [rows][padded_k], float activations
  int64_t first_lookup;     // row from which on there are tables
  uint8_t* tables;          // [rows - first_lookup][words][limbs][kTableBytes]
  float* float_tables;      // [rows - first_lookup][words][kTableFloats]
  float* unit;              // [rows]
  float* poison;            // [rows]: NaN where a row is not finite, else 0; -0, which changes nothing, for codes
};

// The activations of these rows of operands.x, in memory of `scratch`, with tables of those from `first_lookup` on. Rows
// are prepared in parallel.
Panel MakePanel(const Problem& problem, const Operands& operands, const Kernels& kernels, Scheduler& scheduler,
                const std::vector<Segment>& segments, int64_t rows, const int64_t* source, const int32_t* counts,
                int64_t first_lookup, Scratch& scratch);

// Bytes of one row in a panel, about.
int64_t RowBytes(const Problem& problem);

}  // namespace pbjax

#endif  // PBJAX_ACTIVATIONS_H_
