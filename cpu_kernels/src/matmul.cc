// A product is cut into panels of rows, whose activations are prepared once, and a panel into tasks of some rows and some
// channels. A task goes through k once: segment by segment (runs of one group that int32 sums exactly), and inside a
// segment block by block, small enough for the cache. Where there are too few channels for tasks, the words of a segment
// are shared out instead, and what each share sums is added in a fixed order.
#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "activations.h"
#include "row_blocks.h"
#include "scratch.h"

namespace pbjax {
namespace {

constexpr int64_t kMaxPanelBytes = 32 << 20;   // of prepared activations
constexpr int64_t kCodeBytes = 64 << 10;       // of one block of codes: second-level cache
constexpr int64_t kFewRowsCodeBytes = 32 << 10;  // of one that few rows use: first-level cache
constexpr int64_t kFewSums = 32;               // rows times limbs, of few rows
constexpr int64_t kValueBytes = 32 << 10;      // of one block of float weights: first-level cache
constexpr int64_t kWideChannels = 1024;        // of one row: its sums fill the first-level cache
constexpr int64_t kPageWords = 1024;
constexpr int64_t kLookupWords = 4;            // that several rows look up in turn
constexpr int64_t kSerialWork = 1 << 15;       // words times rows below which one thread is enough
constexpr int64_t kNarrowChannels = 64;        // that one task takes, so that shares of k are worth it
constexpr int64_t kShareWords = 1 << 17;       // of all bitlayers, in one share
constexpr int64_t kMaxShares = 8;

class Product {
 public:
  Product(const Problem& problem, const Operands& operands, const Kernels& kernels, Scheduler& scheduler)
      : problem_(problem),
        operands_(operands),
        kernels_(kernels),
        scheduler_(scheduler),
        segments_(MakeSegments(problem)),
        limbs_(problem.limbs()),
        padded_k_(problem.num_words() * kWordBits),
        limit_(problem.prefixes ? std::clamp<int64_t>(operands.counts[0], 0, problem.bits) : 0) {}

  void Run() {
    const int64_t panel_rows = std::clamp<int64_t>(kMaxPanelBytes / RowBytes(problem_), 1, problem_.m);
    std::vector<int32_t> counts(problem_.m);
    std::vector<int64_t> order(problem_.m);
    std::iota(order.begin(), order.end(), 0);
    if (!problem_.prefixes) {
      const auto count = [&](int64_t row) {
        return std::clamp<int32_t>(operands_.counts[row], 1, static_cast<int32_t>(problem_.bits));
      };
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return count(a) < count(b); });
      for (int64_t i = 0; i < problem_.m; ++i) counts[i] = count(order[i]);
    }
    thread_local Scratch scratch;
    for (int64_t start = 0; start < problem_.m; start += panel_rows) {
      const int64_t rows = std::min(panel_rows, problem_.m - start);
      RunPanel(rows, order.data() + start, counts.data() + start, scratch);
    }
  }

 private:
  // What one task computes: rows and channels of the result.
  struct Task {
    const Panel& panel;
    const RowBlock& block;
    int64_t first_channel, channels;
    int64_t width;   // channels, padded
    int64_t shares;  // of the words of each segment
  };

  void RunPanel(int64_t rows, const int64_t* source, const int32_t* counts, Scratch& scratch) {
    const std::vector<RowBlock> blocks =
        MakeRowBlocks(problem_, kernels_, operands_.y, rows, source, counts, limit_);
    const auto lookup = std::find_if(blocks.begin(), blocks.end(),
                                     [](const RowBlock& block) { return block.method == Method::kLookup; });
    // Often the last block only, which has fewer rows than the others.
    const int64_t first_lookup = lookup == blocks.end() ? rows : lookup->first_row;
    const Panel panel = MakePanel(problem_, operands_, kernels_, scheduler_, segments_, rows, source, counts,
                                  first_lookup, scratch);
    const std::vector<int64_t> cuts = Cuts(Width(blocks, rows));
    const int64_t num_blocks = static_cast<int64_t>(blocks.size());
    const int64_t tasks = (static_cast<int64_t>(cuts.size()) - 1) * num_blocks;
    const auto run = [&](int64_t task, int64_t shares) {
      const int64_t first = cuts[task / num_blocks], channels = cuts[task / num_blocks + 1] - first;
      RunTask({panel, blocks[task % num_blocks], first, channels, (channels + 15) / 16 * 16, shares});
    };
    const int64_t shares = problem_.n <= kNarrowChannels && num_blocks == 1 ? Shares(blocks[0]) : 1;
    if (shares > 1) {
      for (int64_t task = 0; task < tasks; ++task) run(task, shares);
    } else {
      ParallelFor(scheduler_, tasks, [&](int64_t task) { run(task, 1); });
    }
  }

  // Channels of a task: wide, so that words are read in long runs; narrow where many rows need sums in the cache.
  int64_t Width(const std::vector<RowBlock>& blocks, int64_t rows) const {
    const RowBlock& block = blocks[0];
    const int64_t outputs = static_cast<int64_t>(block.outputs.size());
    int64_t width = limbs_ == 0 ? (outputs <= 16 ? 256 : 64) : BlockWidth(outputs * limbs_);
    if (block.method == Method::kStream) width = block.rows == 1 ? kWideChannels / 2 : kWideChannels;
    if (block.method == Method::kCodes) width = kWideChannels / 2;  // and a block of codes for their k
    if (block.method == Method::kLookup) width = block.rows == 1 ? kWideChannels : kWideChannels / 2;
    if (problem_.num_words() * problem_.n * rows < kSerialWork) return std::max<int64_t>(16, width);
    const int64_t tasks = scheduler_.num_threads() * 2;  // twice the threads, since some of them may be busy
    const int64_t chunks = std::max<int64_t>(1, tasks / static_cast<int64_t>(blocks.size()));
    const int64_t share = (problem_.n + chunks - 1) / chunks;
    return std::clamp<int64_t>((share + 63) / 64 * 64, 64, width);
  }

  // Where tasks of this many channels begin, and where the last ends. Their words begin with pages, or with equal parts of
  // them, if all rows of words can: what is fetched ahead ends with a page.
  std::vector<int64_t> Cuts(int64_t width) const {
    const int64_t first_word = static_cast<int64_t>(reinterpret_cast<uintptr_t>(operands_.words) / sizeof(uint32_t));
    const bool aligned = kPageWords % width == 0 && problem_.n % width == 0 && first_word % 16 == 0;
    std::vector<int64_t> cuts = {0};
    for (int64_t cut = width - (aligned ? first_word % width : 0); cut + width / 4 <= problem_.n; cut += width) {
      if (cut >= width / 4) cuts.push_back(cut);  // a piece smaller than that goes with its neighbour
    }
    cuts.push_back(problem_.n);
    return cuts;
  }

  // Channels of a block of codes: the more sums each has, the fewer of them.
  static int64_t BlockWidth(int64_t sums) { return sums <= kFewSums / 2 ? 512 : sums <= kFewSums ? 256 : 128; }

  // A number that no thread has a say in, so that sums of floats have the same bits on any machine with these kernels.
  int64_t Shares(const RowBlock& block) const {
    int64_t longest = 0;
    for (const Segment& segment : segments_) longest = std::max(longest, segment.stop - segment.start);
    const int64_t work = longest * problem_.n * block.most() * block.rows;
    return std::clamp<int64_t>(work / kShareWords, 1, std::min(kMaxShares, longest));
  }

  void RunTask(const Task& task) const {
    thread_local Scratch scratch;
    if (limbs_ == 0) {
      FloatTask(task, scratch);
    } else {
      FixedPointTask(task, scratch);
    }
    for (int64_t b = problem_.prefixes ? limit_ : problem_.bits; b < problem_.bits; ++b) {
      for (int64_t row = 0; row < task.block.rows; ++row) {
        const int64_t source = task.panel.source[task.block.first_row + row];
        float* y = operands_.y + (b * problem_.m + source) * problem_.n + task.first_channel;
        std::fill(y, y + task.channels, 0.0f);
      }
    }
  }

  WordBlock Words(const Task& task, int column, int layers, int64_t start, int64_t stop) const {
    const int64_t layer_stride = problem_.num_words() * problem_.n;
    return {operands_.words + column * kLimbBits * layer_stride + start * problem_.n + task.first_channel,
            layer_stride,
            problem_.n,
            layers,
            stop - start,
            task.channels};
  }

  // Runs sum(first word, last word, its buffer) for each share of a segment, and adds up what they leave in the buffers:
  // `shares` of `size` numbers each, of which the first buffer then holds the sums.
  template <typename T, typename Sum>
  void InShares(const Segment& segment, int64_t shares, T* sums, int64_t size, const Sum& sum) const {
    if (shares == 1) return sum(segment.start, segment.stop, sums);
    const int64_t words = segment.stop - segment.start;
    ParallelFor(scheduler_, shares, [&](int64_t i) {
      T* its = sums + i * size;
      if (i > 0) std::fill(its, its + size, T());
      const int64_t start = segment.start + words * i / shares, stop = segment.start + words * (i + 1) / shares;
      if (start < stop) sum(start, stop, its);
    });
    for (int64_t i = 1; i < shares; ++i) {
      for (int64_t j = 0; j < size; ++j) sums[j] += sums[i * size + j];
    }
  }

  void FixedPointTask(const Task& task, Scratch& scratch) const {
    const RowBlock& block = task.block;
    const int64_t width = task.width, outputs = static_cast<int64_t>(block.outputs.size());
    const int64_t num_sums = (block.sums[0] + block.sums[1]) * limbs_ * width;
    scratch.Start(Scratch::Bytes<int32_t>(num_sums * task.shares) + 2 * Scratch::Bytes<float>(outputs * width));
    int32_t* sums = scratch.Take<int32_t>(num_sums * task.shares);
    const int32_t* column_sums[2] = {sums, sums + block.sums[0] * limbs_ * width};
    float* group_sums = scratch.Take<float>(outputs * width);
    float* totals = scratch.Take<float>(outputs * width);
    std::fill(totals, totals + outputs * width, 0.0f);

    for (int64_t s = 0; s < static_cast<int64_t>(segments_.size()); ++s) {
      const Segment& segment = segments_[s];
      std::fill(sums, sums + num_sums, 0);
      InShares(segment, task.shares, sums, num_sums, [&](int64_t start, int64_t stop, int32_t* its) {
        for (int column = 0; column < 2; ++column) {
          if (!block.columns[column].empty()) AddSums(task, column, start, stop, its);
          its += block.sums[0] * limbs_ * width;
        }
      });
      if (segment.first) std::fill(group_sums, group_sums + outputs * width, 0.0f);
      for (int64_t i = 0; i < outputs; ++i) {
        const Output& output = block.outputs[i];
        Columns columns = {};
        for (int column = 0; column < 2; ++column) {
          const int layers = column == 0 ? std::min(output.count, kLimbBits) : std::max(output.count - kLimbBits, 0);
          columns.sums[column] = column_sums[column] + (layers == 0 ? 0 : output.sums[column] * limbs_ * width);
          columns.shift[column] = block.method == Method::kBlocks ? kLimbBits - layers : 0;
          columns.layers[column] = layers;
        }
        columns.limb_sums = LimbSums(task, output.row, s);
        columns.limbs = limbs_;
        kernels_.combine(columns, width, group_sums + i * width);
        if (segment.last) {
          const float factor = std::ldexp(1.0f, 2 - problem_.activation_bits - output.count);
          AddGroup(task, segment.group, output.count, factor, group_sums + i * width, totals + i * width);
        }
      }
    }
    Finish(task, totals);
  }

  const int32_t* LimbSums(const Task& task, int64_t row, int64_t segment) const {
    const int64_t num_segments = static_cast<int64_t>(segments_.size());
    return task.panel.limb_sums + ((task.block.first_row + row) * num_segments + segment) * limbs_;
  }

  LimbRows Limbs(const Task& task, int64_t first, int64_t rows, int64_t word) const {
    const int64_t limb_stride = task.panel.limb_stride, row_stride = limbs_ * limb_stride;
    return {task.panel.limbs + (task.block.first_row + first) * row_stride + word * kWordBits, row_stride, limb_stride,
            limbs_, rows};
  }

  // Adds the products of limbs with up to 8 bitlayers, in some words of a segment.
  void AddSums(const Task& task, int column, int64_t start, int64_t stop, int32_t* sums) const {
    thread_local Scratch scratch;
    const RowBlock& block = task.block;
    const int64_t width = task.width;
    if (block.method == Method::kStream) {
      const MaskedRows& run = block.columns[column].front();
      const int64_t size = StreamScratch(width, run.rows * limbs_);
      scratch.Start(Scratch::Bytes<int32_t>(size));
      kernels_.stream(Words(task, column, block.layers[column], start, stop), Limbs(task, run.first_row, run.rows, start),
                      scratch.Take<int32_t>(size), sums, width);
      return;
    }
    if (block.method == Method::kLookup) return LookupSums(task, column, start, stop, sums);
    const bool few = static_cast<int64_t>(block.outputs.size()) * limbs_ <= kFewSums;
    const int64_t block_words = std::max<int64_t>(1, (few ? kFewRowsCodeBytes : kCodeBytes) / (kWordBits * width));
    scratch.Start(Scratch::Bytes<uint8_t>(block_words * kWordBits * width));
    uint8_t* codes = scratch.Take<uint8_t>(block_words * kWordBits * width);
    for (int64_t word = start; word < stop; word += block_words) {
      const int64_t end = std::min(word + block_words, stop);
      kernels_.unpack(Words(task, column, block.layers[column], word, end), width, codes);
      for (const MaskedRows& run : block.columns[column]) {
        const bool all = run.layers == block.layers[column];  // codes have no other bits
        const uint8_t mask = all ? 0xFF : static_cast<uint8_t>(0xFF00u >> run.layers);
        kernels_.dot(codes, end - word, width, mask,
                     Limbs(task, run.first_row, run.rows, word), sums + run.first_sum * limbs_ * width);
      }
    }
  }

  // Runs body(row of the panel, its bitlayers, its sums) for the rows of a look-up.
  template <typename T, typename Body>
  void ForRows(const RowBlock& block, int column, T* sums, int64_t row_size, const Body& body) const {
    for (const MaskedRows& run : block.columns[column]) {
      for (int64_t i = 0; i < run.rows; ++i) {
        body(block.first_row + run.first_row + i, run.layers, sums + (run.first_sum + i) * row_size);
      }
    }
  }

  void LookupSums(const Task& task, int column, int64_t start, int64_t stop, int32_t* sums) const {
    const RowBlock& block = task.block;
    const int64_t row_size = limbs_ * task.width, layer_stride = block.rows * row_size;
    const int64_t block_words = block.rows == 1 ? stop - start : kLookupWords;
    for (int64_t word = start; word < stop; word += block_words) {
      const int64_t end = std::min(word + block_words, stop);
      ForRows(block, column, sums, row_size, [&](int64_t row, int layers, int32_t* its) {
        const int64_t place = (row - task.panel.first_lookup) * problem_.num_words() + word;
        const uint8_t* tables = task.panel.tables + place * limbs_ * kTableBytes;
        kernels_.lookup(Words(task, column, layers, word, end), tables, limbs_, its, layer_stride, task.width);
      });
    }
    ForRows(block, column, sums, row_size, [&](int64_t, int layers, int32_t* its) {
      kernels_.add_layers(layers, limbs_, stop - start, task.width, its, layer_stride);
    });
  }

  void FloatTask(const Task& task, Scratch& scratch) const {
    const RowBlock& block = task.block;
    const int64_t width = task.width, outputs = static_cast<int64_t>(block.outputs.size());
    const int64_t size = block.sums[0] * width;
    scratch.Start(Scratch::Bytes<float>(size * task.shares) + Scratch::Bytes<float>(outputs * width));
    float* group_sums = scratch.Take<float>(size * task.shares);
    float* totals = scratch.Take<float>(outputs * width);
    std::fill(totals, totals + outputs * width, 0.0f);

    for (const Segment& segment : segments_) {
      if (segment.first) std::fill(group_sums, group_sums + size, 0.0f);
      InShares(segment, task.shares, group_sums, size,
               [&](int64_t start, int64_t stop, float* its) { AddFloatSums(task, start, stop, its); });
      if (!segment.last) continue;
      if (block.method == Method::kLookup) {
        ForRows(block, 0, group_sums, width, [&](int64_t, int layers, float* its) {
          kernels_.add_float_layers(layers, width, its, block.rows * width);
        });
      }
      for (int64_t i = 0; i < outputs; ++i) {
        const Output& output = block.outputs[i];
        AddGroup(task, segment.group, output.count, 1.0f, group_sums + output.sums[0] * width, totals + i * width);
      }
    }
    Finish(task, totals);
  }

  // Adds the products of float rows with weights, in some words of a segment.
  void AddFloatSums(const Task& task, int64_t start, int64_t stop, float* sums) const {
    thread_local Scratch scratch;
    const RowBlock& block = task.block;
    const int64_t width = task.width;
    if (block.method == Method::kLookup) return LookupFloatSums(task, start, stop, sums);
    const bool from_codes = block.method == Method::kCodes;
    const int64_t bytes = from_codes ? kCodeBytes : kValueBytes / 4;
    const int64_t block_words = std::max<int64_t>(1, bytes / (kWordBits * width));
    const int64_t block_size = block_words * kWordBits * width, num_values = from_codes ? 0 : block_size;
    scratch.Start(2 * Scratch::Bytes<uint8_t>(block_size) + Scratch::Bytes<float>(num_values));
    uint8_t* high = scratch.Take<uint8_t>(block_size);
    uint8_t* low = scratch.Take<uint8_t>(block_size);
    float* values = scratch.Take<float>(num_values);
    for (int64_t word = start; word < stop; word += block_words) {
      const int64_t end = std::min(word + block_words, stop);
      if (block.layers[0] > 0) kernels_.unpack(Words(task, 0, block.layers[0], word, end), width, high);
      if (block.layers[1] > 0) kernels_.unpack(Words(task, 1, block.layers[1], word, end), width, low);
      for (const MaskedRows& run : block.columns[0]) {
        const float* x = task.panel.values + (block.first_row + run.first_row) * padded_k_ + word * kWordBits;
        float* its = sums + run.first_sum * width;
        if (from_codes) {
          kernels_.float_codes(high, end - word, width, run.layers, x, padded_k_, run.rows, its);
        } else {
          kernels_.values(high, run.layers > kLimbBits ? low : nullptr, end - word, width, run.layers, values);
          kernels_.float_dot(values, (end - word) * kWordBits, width, x, padded_k_, run.rows, its);
        }
      }
    }
  }

  void LookupFloatSums(const Task& task, int64_t start, int64_t stop, float* sums) const {
    const RowBlock& block = task.block;
    const int64_t block_words = block.rows == 1 ? stop - start : kLookupWords;
    for (int64_t word = start; word < stop; word += block_words) {
      const int64_t end = std::min(word + block_words, stop);
      ForRows(block, 0, sums, task.width, [&](int64_t row, int layers, float* its) {
        const int64_t place = (row - task.panel.first_lookup) * problem_.num_words() + word;
        const float* tables = task.panel.float_tables + place * kTableFloats;
        kernels_.float_lookup(Words(task, 0, layers, word, end), tables, its, block.rows * task.width);
      });
    }
  }

  void AddGroup(const Task& task, int64_t group, int count, float factor, const float* group_sum, float* total) const {
    const int64_t row = std::min<int64_t>({count, problem_.bits, kNumScales}) - 1;
    const float* scale = operands_.scale + (row * problem_.groups() + group) * problem_.n + task.first_channel;
    const auto add = problem_.groups() == 1 ? kernels_.scale_only : kernels_.scale_add;
    add(group_sum, scale, factor, task.channels, total);
  }

  void Finish(const Task& task, const float* totals) const {
    for (size_t i = 0; i < task.block.outputs.size(); ++i) {
      const Output& output = task.block.outputs[i];
      const int64_t row = task.block.first_row + output.row;
      kernels_.finish_row(totals + i * task.width, task.panel.unit[row], task.panel.poison[row], task.channels,
                          output.y + task.first_channel);
    }
  }

  const Problem problem_;
  const Operands operands_;
  const Kernels& kernels_;
  Scheduler& scheduler_;
  const std::vector<Segment> segments_;
  const int limbs_;
  const int64_t padded_k_;
  const int64_t limit_;
};

}  // namespace

void Matmul(const Problem& problem, const Operands& operands, const Kernels& kernels, Scheduler& scheduler) {
  if (problem.m > 0 && problem.n > 0) Product(problem, operands, kernels, scheduler).Run();
}

}  // namespace pbjax
