// Rows that one task takes together, the results that they give, and where the sums of these lie.
//
// Rows are sorted by their number of bitlayers, so that those with the same mask of code bits are neighbours; a sweep is
// the same rows under every mask.
#ifndef PBJAX_ROW_BLOCKS_H_
#define PBJAX_ROW_BLOCKS_H_

#include <stdint.h>

#include <vector>

#include "kernels.h"
#include "problem.h"

namespace pbjax {

// Rows that share a mask of code bits, and where their sums go.
struct MaskedRows {
  int64_t first_row, rows;
  int layers;
  int64_t first_sum;
};

// One row of the result: a row of activations at a number of bitlayers.
struct Output {
  int64_t row;
  int count;
  int64_t sums[2];  // in each column of code limbs
  float* y;         // channel 0
};

struct RowBlock {
  int64_t first_row, rows;
  std::vector<MaskedRows> columns[2];  // bitlayers 0..7 and 8..15; with float activations [0] holds all
  std::vector<Output> outputs;
  int layers[2];
  int64_t sums[2];  // rows of sums in each column: of masks, or, for a look-up, of rows at each bitlayer
  Method method;

  int most() const { return layers[0] + layers[1]; }
};

// Blocks of rows. With prefixes there is a result at each of 1..limit bitlayers; else counts[row], ascending, says at how
// many. `source[row]` is the row of y.
std::vector<RowBlock> MakeRowBlocks(const Problem& problem, const Kernels& kernels, float* y, int64_t rows,
                                    const int64_t* source, const int32_t* counts, int64_t limit);

}  // namespace pbjax

#endif  // PBJAX_ROW_BLOCKS_H_
