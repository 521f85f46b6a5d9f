#include "row_blocks.h"

#include <algorithm>

namespace pbjax {
namespace {

constexpr int64_t kMaxBlockRows = 128;  // of results

Method Choose(const Kernels& kernels, int limbs, bool sweep, bool may_stream, int64_t rows, int layers) {
  for (int i = 0; i < kernels.num_choices; ++i) {
    const Choice& choice = kernels.choices[i];
    if (choice.limbs != limbs || choice.sweep != sweep || rows > choice.max_rows || layers > choice.max_layers) continue;
    const bool possible = choice.method == Method::kStream   ? kernels.stream != nullptr && limbs > 0 &&
                                                                  rows <= kStreamRows && may_stream
                          : choice.method == Method::kCodes  ? kernels.float_codes != nullptr && limbs == 0 &&
                                                                  rows <= kFewRows && layers <= kLimbBits
                          : choice.method == Method::kLookup ? (limbs == 0 ? kernels.float_lookup != nullptr
                                                                           : kernels.lookup != nullptr)
                                                             : true;
    if (possible) return choice.method;
  }
  return Method::kBlocks;
}

RowBlock MakeSweep(const Problem& problem, float* y, int64_t rows, const int64_t* source, int most) {
  RowBlock block = {};
  block.layers[0] = std::min(most, kLimbBits);
  block.layers[1] = std::max(most - kLimbBits, 0);
  const int first = problem.limbs() == 0 ? most : block.layers[0];  // floats take both columns in one
  const int second = problem.limbs() == 0 ? 0 : block.layers[1];
  for (int b = 1; b <= first; ++b) block.columns[0].push_back({0, rows, b, (b - 1) * rows});
  for (int b = 1; b <= second; ++b) block.columns[1].push_back({0, rows, b, (b - 1) * rows});
  for (int b = 1; b <= most; ++b) {
    for (int64_t row = 0; row < rows; ++row) {
      block.outputs.push_back({row, b, {(std::min(b, first) - 1) * rows + row, (b - 9) * rows + row},
                               y + ((b - 1) * problem.m + source[row]) * problem.n});
    }
  }
  block.sums[0] = first * rows;
  block.sums[1] = second * rows;
  return block;
}

RowBlock MakeCounted(const Problem& problem, float* y, int64_t rows, const int64_t* source, const int32_t* counts) {
  RowBlock block = {};
  const int most = counts[rows - 1], column_layers = problem.limbs() == 0 ? kMaxBits : kLimbBits;
  block.layers[0] = std::min(most, kLimbBits);
  block.layers[1] = std::max(most - kLimbBits, 0);
  const auto add = [](std::vector<MaskedRows>& runs, int64_t row, int layers, int64_t sum) {
    if (!runs.empty() && runs.back().layers == layers) {
      ++runs.back().rows;
    } else {
      runs.push_back({row, 1, layers, sum});
    }
  };
  int64_t first_deep = rows;  // of the rows with more than 8 bitlayers
  for (int64_t row = 0; row < rows; ++row) {
    const int count = counts[row];
    add(block.columns[0], row, std::min(count, column_layers), row);
    if (count > column_layers) {
      first_deep = std::min(first_deep, row);
      add(block.columns[1], row, count - kLimbBits, row - first_deep);
    }
    block.outputs.push_back({row, count, {row, row - first_deep}, y + source[row] * problem.n});
  }
  block.sums[0] = rows;
  block.sums[1] = rows - first_deep;
  return block;
}

// A look-up has sums for every row at each bitlayer, and looks up each row once.
void ArrangeForLookup(const Problem& problem, RowBlock& block) {
  const int64_t rows = block.rows;
  const int first = problem.limbs() == 0 ? block.most() : block.layers[0];
  for (std::vector<MaskedRows>& runs : block.columns) {
    if (problem.prefixes && !runs.empty()) runs.erase(runs.begin(), runs.end() - 1);
    for (MaskedRows& run : runs) run.first_sum = run.first_row;
  }
  for (Output& output : block.outputs) {
    output.sums[0] = (std::min(output.count, first) - 1) * rows + output.row;
    output.sums[1] = (output.count - kLimbBits - 1) * rows + output.row;
  }
  block.sums[0] = first * rows;
  block.sums[1] = (block.most() - first) * rows;
}

}  // namespace

std::vector<RowBlock> MakeRowBlocks(const Problem& problem, const Kernels& kernels, float* y, int64_t rows,
                                    const int64_t* source, const int32_t* counts, int64_t limit) {
  const int64_t outputs_per_row = problem.prefixes ? std::max<int64_t>(1, limit) : 1;
  const int64_t block_rows = std::max<int64_t>(1, kMaxBlockRows / outputs_per_row);
  std::vector<RowBlock> blocks;
  for (int64_t first = 0; first < rows; first += block_rows) {
    const int64_t size = std::min(block_rows, rows - first);
    blocks.push_back(problem.prefixes ? MakeSweep(problem, y, size, source + first, static_cast<int>(limit))
                                      : MakeCounted(problem, y, size, source + first, counts + first));
    RowBlock& block = blocks.back();
    block.first_row = first;
    block.rows = size;
    // Sums of several rows are added up after each group, which costs more than streaming saves (1.1 to 2.1 times the
    // time of kBlocks at 128 inputs).
    const bool uniform = block.columns[0].size() <= 1 && block.columns[1].size() <= 1;
    const bool may_stream = uniform && (size == 1 || problem.group_size == 0);
    block.method = Choose(kernels, problem.limbs(), problem.prefixes, may_stream, size, block.most());
    if (block.method == Method::kLookup) ArrangeForLookup(problem, block);
  }
  return blocks;
}

}  // namespace pbjax
