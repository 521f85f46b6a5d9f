// A product is cut into panels of rows, whose activations are prepared once, and a panel into tasks of some rows and some
// channels. A task goes through k once: segment by segment (runs of one group that int32 sums exactly), and inside a
// segment block by block, small enough for the cache. Rows are sorted by their number of bitlayers, so that those with
// the same mask of code bits are neighbours; a sweep is the same rows under every mask.
#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

namespace pbjax {
namespace {

constexpr int64_t kMaxBlockRows = 128;         // of one task
constexpr int64_t kMaxPanelBytes = 32 << 20;   // of prepared activations
constexpr int64_t kCodeBytes = 64 << 10;       // of one block of codes: second-level cache
constexpr int64_t kValueBytes = 32 << 10;      // of one block of float weights: first-level cache
constexpr int64_t kStreamChannels = 1024;      // their sums fill the first-level cache
constexpr int64_t kPrepareWork = 1 << 14;      // activations that one task prepares
constexpr int64_t kSerialWork = 1 << 15;       // words times rows below which one thread is enough

// Memory that a thread keeps from call to call.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  void Start(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(kAlignment, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    used_ = 0;
  }

  template <typename T>
  T* Take(int64_t count) {
    T* result = reinterpret_cast<T*>(data_ + used_);
    used_ += Bytes<T>(count);
    return result;
  }

  template <typename T>
  static size_t Bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }

 private:
  static constexpr size_t kAlignment = 64;
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

struct Segment {
  int64_t group, start, stop;  // words
  bool first, last;            // of its group
};

std::vector<Segment> Segments(const Problem& problem) {
  constexpr int64_t kStep = kMaxExactK / kWordBits;
  std::vector<Segment> segments;
  for (int64_t group = 0; group < problem.groups(); ++group) {
    const int64_t begin = group * problem.words_per_group();
    const int64_t end = std::min(begin + problem.words_per_group(), problem.num_words());
    for (int64_t start = begin; start < end; start += kStep) {
      segments.push_back({group, start, std::min(start + kStep, end), start == begin, start + kStep >= end});
    }
  }
  return segments;
}

float BFloat16ToFloat(uint16_t bits) {
  const uint32_t pattern = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &pattern, sizeof value);
  return value;
}

float Float16ToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
  if (magnitude < 0x0400u) {
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const uint32_t exponent = magnitude >= 0x7C00u ? 0x7F800000u - 0x0F800000u : 0x38000000u;
  const uint32_t pattern = sign | ((magnitude << 13) + exponent);
  float value;
  std::memcpy(&value, &pattern, sizeof value);
  return value;
}

// Rows of float32 as they are, or converted into `buffer`.
const float* FloatRow(const Problem& problem, const void* x, int64_t row, float* buffer) {
  const int64_t start = row * problem.k;
  if (problem.row_type == RowType::kFloat32) return static_cast<const float*>(x) + start;
  const uint16_t* narrow = static_cast<const uint16_t*>(x) + start;
  const auto convert = problem.row_type == RowType::kBFloat16 ? BFloat16ToFloat : Float16ToFloat;
  for (int64_t i = 0; i < problem.k; ++i) buffer[i] = convert(narrow[i]);
  return buffer;
}

// The activations of a panel of rows, in the order in which tasks take them.
struct Panel {
  int64_t rows;
  const int64_t* source;  // [rows]: row of x and y
  const int32_t* counts;  // [rows], ascending; unused with prefixes
  uint8_t* limbs;         // [rows][limbs][padded_k]
  int32_t* limb_sums;     // [rows][segments][limbs]
  float* values;          // [rows][padded_k], float activations
  float* unit;            // [rows]
  float* poison;          // [rows]: NaN where a row is not finite, else 0
};

class Product {
 public:
  Product(const Problem& problem, const Operands& operands, const Kernels& kernels, Scheduler& scheduler)
      : problem_(problem),
        operands_(operands),
        kernels_(kernels),
        scheduler_(scheduler),
        segments_(Segments(problem)),
        limbs_(problem.limbs()),
        padded_k_(problem.num_words() * kWordBits),
        limit_(problem.prefixes ? std::clamp<int64_t>(operands.counts[0], 0, problem.bits) : 0) {}

  void Run() {
    const int64_t row_bytes = std::max<int64_t>(1, padded_k_ * (limbs_ == 0 ? 4 : limbs_));
    const int64_t panel_rows = std::clamp<int64_t>(kMaxPanelBytes / row_bytes, 1, problem_.m);
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
    int64_t sums[2];  // rows of sums in each column
  };

  void RunPanel(int64_t rows, const int64_t* source, const int32_t* counts, Scratch& scratch) {
    const int64_t num_segments = static_cast<int64_t>(segments_.size());
    const int64_t limb_bytes = rows * limbs_ * padded_k_, num_sums = rows * num_segments * limbs_;
    const int64_t num_values = limbs_ == 0 ? rows * padded_k_ : 0;
    scratch.Start(Scratch::Bytes<uint8_t>(limb_bytes) + Scratch::Bytes<int32_t>(num_sums) +
                  Scratch::Bytes<float>(num_values) + 2 * Scratch::Bytes<float>(rows));
    Panel panel = {};
    panel.rows = rows;
    panel.source = source;
    panel.counts = counts;
    panel.limbs = scratch.Take<uint8_t>(limb_bytes);
    panel.limb_sums = scratch.Take<int32_t>(num_sums);
    panel.values = scratch.Take<float>(num_values);
    panel.unit = scratch.Take<float>(rows);
    panel.poison = scratch.Take<float>(rows);
    const int64_t rows_per_task = std::max<int64_t>(1, kPrepareWork / std::max<int64_t>(1, padded_k_));
    const int64_t tasks = (rows + rows_per_task - 1) / rows_per_task;
    ParallelFor(scheduler_, tasks, [&](int64_t task) {
      const int64_t stop = std::min(rows, (task + 1) * rows_per_task);
      for (int64_t row = task * rows_per_task; row < stop; ++row) Prepare(panel, row);
    });

    const std::vector<RowBlock> blocks = RowBlocks(panel);
    const int64_t width = Width(blocks, rows);
    const int64_t chunks = (problem_.n + width - 1) / width;
    ParallelFor(scheduler_, chunks * static_cast<int64_t>(blocks.size()), [&](int64_t task) {
      const int64_t first = task / static_cast<int64_t>(blocks.size()) * width;
      RunTask(panel, blocks[task % blocks.size()], first, std::min(width, problem_.n - first));
    });
  }

  void Prepare(const Panel& panel, int64_t row) const {
    thread_local Scratch scratch;
    const int64_t source = panel.source[row];
    bool finite = true;
    panel.unit[row] = 1.0f;
    uint8_t* limbs = panel.limbs + row * limbs_ * padded_k_;
    if (problem_.row_type == RowType::kCodes) {
      kernels_.split(static_cast<const int32_t*>(operands_.x) + source * problem_.k, problem_.k, padded_k_, limbs_,
                     limbs, padded_k_);
    } else {
      scratch.Start(Scratch::Bytes<float>(problem_.k));
      const float* x = FloatRow(problem_, operands_.x, source, scratch.Take<float>(problem_.k));
      if (limbs_ > 0) {
        finite = kernels_.quantize(x, problem_.k, padded_k_, problem_.activation_bits, limbs, padded_k_,
                                   panel.unit + row);
      } else {
        float* values = panel.values + row * padded_k_;
        std::fill(values + problem_.k, values + padded_k_, 0.0f);
        bool large = false;
        for (int64_t i = 0; i < problem_.k; ++i) {
          finite = finite & (std::abs(x[i]) <= std::numeric_limits<float>::max());
          large = large | (std::abs(x[i]) >= 0x1p64f);
        }
        // Kernels may sum up to 2**31 times the row, so rows of large values are scaled down, exactly.
        if (finite && large) panel.unit[row] = 0x1p64f;
        const float factor = finite ? 1.0f / panel.unit[row] : 0.0f;
        for (int64_t i = 0; i < problem_.k; ++i) values[i] = finite ? x[i] * factor : 0.0f;
      }
    }
    panel.poison[row] = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    const int64_t num_segments = static_cast<int64_t>(segments_.size());
    for (int64_t s = 0; s < num_segments; ++s) {
      const Segment& segment = segments_[s];
      for (int limb = 0; limb < limbs_; ++limb) {
        panel.limb_sums[(row * num_segments + s) * limbs_ + limb] =
            kernels_.sum(limbs + limb * padded_k_ + segment.start * kWordBits,
                         (segment.stop - segment.start) * kWordBits, limb == 0);
      }
    }
  }

  std::vector<RowBlock> RowBlocks(const Panel& panel) const {
    const int64_t outputs_per_row = problem_.prefixes ? std::max<int64_t>(1, limit_) : 1;
    const int64_t block_rows = std::max<int64_t>(1, kMaxBlockRows / outputs_per_row);
    std::vector<RowBlock> blocks;
    for (int64_t first = 0; first < panel.rows; first += block_rows) {
      blocks.push_back(MakeRowBlock(panel, first, std::min(block_rows, panel.rows - first)));
    }
    return blocks;
  }

  RowBlock MakeRowBlock(const Panel& panel, int64_t first, int64_t rows) const {
    RowBlock block;
    block.first_row = first;
    block.rows = rows;
    const bool is_float = limbs_ == 0;
    const int64_t plane = problem_.m * problem_.n;
    const int column_layers = is_float ? kMaxBits : kLimbBits;
    const int most = static_cast<int>(problem_.prefixes ? limit_ : panel.counts[first + rows - 1]);
    block.layers[0] = std::min(most, kLimbBits);
    block.layers[1] = std::max(most - kLimbBits, 0);
    const int second = is_float ? 0 : block.layers[1];  // floats take both in one
    if (problem_.prefixes) {
      for (int b = 1; b <= std::min(most, column_layers); ++b) block.columns[0].push_back({0, rows, b, (b - 1) * rows});
      for (int b = 1; b <= second; ++b) block.columns[1].push_back({0, rows, b, (b - 1) * rows});
      for (int b = 1; b <= most; ++b) {
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t source = panel.source[first + row];
          block.outputs.push_back({row, b, {(std::min(b, column_layers) - 1) * rows + row, (b - 9) * rows + row},
                                   operands_.y + (b - 1) * plane + source * problem_.n});
        }
      }
      block.sums[0] = std::min(most, column_layers) * rows;
      block.sums[1] = second * rows;
      return block;
    }
    const auto add = [](std::vector<MaskedRows>& runs, int64_t row, int layers, int64_t sum) {
      if (!runs.empty() && runs.back().layers == layers) {
        ++runs.back().rows;
      } else {
        runs.push_back({row, 1, layers, sum});
      }
    };
    int64_t first_deep = rows;  // of the rows with more than 8 bitlayers
    for (int64_t row = 0; row < rows; ++row) {
      const int count = panel.counts[first + row];
      add(block.columns[0], row, std::min(count, column_layers), row);
      if (count > column_layers) {
        first_deep = std::min(first_deep, row);
        add(block.columns[1], row, count - kLimbBits, row - first_deep);
      }
      block.outputs.push_back(
          {row, count, {row, row - first_deep}, operands_.y + panel.source[first + row] * problem_.n});
    }
    block.sums[0] = rows;
    block.sums[1] = rows - first_deep;
    return block;
  }

  bool Streams(const RowBlock& block) const {
    return kernels_.stream != nullptr && limbs_ > 0 && block.outputs.size() == 1;
  }

  bool FromCodes(const RowBlock& block) const {
    return kernels_.float_codes != nullptr && limbs_ == 0 && block.rows <= kFewRows && block.layers[1] == 0;
  }

  // Channels of a task: wide, so that words are read in long runs; narrow where many rows need sums in the cache.
  int64_t Width(const std::vector<RowBlock>& blocks, int64_t rows) const {
    const int64_t outputs = static_cast<int64_t>(blocks[0].outputs.size());
    int64_t width = limbs_ == 0 ? (outputs <= 16 ? 256 : 64) : (outputs <= 16 ? 512 : 128);
    if (Streams(blocks[0])) width = kStreamChannels;
    if (FromCodes(blocks[0])) width = kStreamChannels / 2;  // and a block of codes for their k
    if (problem_.num_words() * problem_.n * rows < kSerialWork) return std::max<int64_t>(16, width);
    const int64_t tasks = scheduler_.num_threads() * 2;  // twice the threads, since some of them may be busy
    const int64_t chunks = std::max<int64_t>(1, tasks / static_cast<int64_t>(blocks.size()));
    const int64_t share = (problem_.n + chunks - 1) / chunks;
    return std::clamp<int64_t>((share + 63) / 64 * 64, 64, width);
  }

  void RunTask(const Panel& panel, const RowBlock& block, int64_t first_channel, int64_t channels) const {
    thread_local Scratch scratch;
    if (limbs_ == 0) {
      FloatTask(panel, block, first_channel, channels, scratch);
    } else {
      FixedPointTask(panel, block, first_channel, channels, scratch);
    }
    for (int64_t b = problem_.prefixes ? limit_ : problem_.bits; b < problem_.bits; ++b) {
      for (int64_t row = 0; row < block.rows; ++row) {
        float* y = operands_.y + (b * problem_.m + panel.source[block.first_row + row]) * problem_.n + first_channel;
        std::fill(y, y + channels, 0.0f);
      }
    }
  }

  WordBlock Words(int column, int layers, int64_t start, int64_t stop, int64_t first_channel, int64_t channels) const {
    const int64_t layer_stride = problem_.num_words() * problem_.n;
    return {operands_.words + column * kLimbBits * layer_stride + start * problem_.n + first_channel,
            layer_stride,
            problem_.n,
            layers,
            stop - start,
            channels};
  }

  void FixedPointTask(const Panel& panel, const RowBlock& block, int64_t first_channel, int64_t channels,
                      Scratch& scratch) const {
    const int64_t width = (channels + 15) / 16 * 16, outputs = static_cast<int64_t>(block.outputs.size());
    const int64_t num_segments = static_cast<int64_t>(segments_.size());
    const bool streams = Streams(block);
    const int64_t block_words = std::max<int64_t>(1, kCodeBytes / (kWordBits * width));
    const int64_t code_bytes = streams ? 0 : block_words * kWordBits * width;
    const int64_t stream_size = streams ? StreamScratch(width, limbs_) : 0;
    const int64_t num_sums[2] = {block.sums[0] * limbs_ * width, block.sums[1] * limbs_ * width};
    scratch.Start(Scratch::Bytes<uint8_t>(code_bytes) + Scratch::Bytes<int32_t>(stream_size) +
                  Scratch::Bytes<int32_t>(num_sums[0]) + Scratch::Bytes<int32_t>(num_sums[1]) +
                  2 * Scratch::Bytes<float>(outputs * width));
    uint8_t* codes = scratch.Take<uint8_t>(code_bytes);
    int32_t* stream_scratch = scratch.Take<int32_t>(stream_size);
    int32_t* sums[2] = {scratch.Take<int32_t>(num_sums[0]), scratch.Take<int32_t>(num_sums[1])};
    float* group_sums = scratch.Take<float>(outputs * width);
    float* totals = scratch.Take<float>(outputs * width);
    std::fill(totals, totals + outputs * width, 0.0f);

    for (int64_t s = 0; s < num_segments; ++s) {
      const Segment& segment = segments_[s];
      const auto limb_sums = [&](int64_t row) {
        return panel.limb_sums + ((block.first_row + row) * num_segments + s) * limbs_;
      };
      const auto limb_rows = [&](int64_t first, int64_t rows, int64_t word) {
        return LimbRows{panel.limbs + (block.first_row + first) * limbs_ * padded_k_ + word * kWordBits,
                        limbs_ * padded_k_, padded_k_, limbs_, rows};
      };
      for (int column = 0; column < 2; ++column) {
        if (block.columns[column].empty()) continue;
        if (streams) {
          kernels_.stream(Words(column, block.layers[column], segment.start, segment.stop, first_channel, channels),
                          limb_rows(0, 1, segment.start), limb_sums(0), stream_scratch, sums[column], width);
          continue;
        }
        std::fill(sums[column], sums[column] + num_sums[column], 0);
        for (int64_t word = segment.start; word < segment.stop; word += block_words) {
          const int64_t stop = std::min(word + block_words, segment.stop);
          kernels_.unpack(Words(column, block.layers[column], word, stop, first_channel, channels), width, codes);
          if (problem_.prefixes && kernels_.dot_prefixes != nullptr) {
            kernels_.dot_prefixes(codes, stop - word, width, block.layers[column], limb_rows(0, block.rows, word),
                                  sums[column]);
            continue;
          }
          for (const MaskedRows& run : block.columns[column]) {
            kernels_.dot(codes, stop - word, width, static_cast<uint8_t>(0xFF00u >> run.layers),
                         limb_rows(run.first_row, run.rows, word), sums[column] + run.first_sum * limbs_ * width);
          }
        }
      }
      if (segment.first) std::fill(group_sums, group_sums + outputs * width, 0.0f);
      for (int64_t i = 0; i < outputs; ++i) {
        const Output& output = block.outputs[i];
        Columns columns = {};
        for (int column = 0; column < 2; ++column) {
          const int layers = column == 0 ? std::min(output.count, kLimbBits) : std::max(output.count - kLimbBits, 0);
          columns.sums[column] = sums[column] + (layers == 0 ? 0 : output.sums[column] * limbs_ * width);
          columns.shift[column] = streams ? 0 : kLimbBits - layers;
          columns.layers[column] = layers;
        }
        columns.limb_sums = limb_sums(output.row);
        columns.limbs = limbs_;
        kernels_.combine(columns, width, group_sums + i * width);
        if (segment.last) {
          const float factor = std::ldexp(1.0f, 2 - problem_.activation_bits - output.count);
          AddGroup(segment.group, output.count, factor, first_channel, channels, group_sums + i * width,
                   totals + i * width);
        }
      }
    }
    Finish(panel, block, first_channel, channels, width, totals);
  }

  void FloatTask(const Panel& panel, const RowBlock& block, int64_t first_channel, int64_t channels,
                 Scratch& scratch) const {
    const int64_t width = (channels + 15) / 16 * 16, outputs = static_cast<int64_t>(block.outputs.size());
    const bool from_codes = FromCodes(block);
    const int64_t bytes = from_codes ? kCodeBytes : kValueBytes / 4;
    const int64_t block_words = std::max<int64_t>(1, bytes / (kWordBits * width));
    const int64_t block_size = block_words * kWordBits * width, num_values = from_codes ? 0 : block_size;
    scratch.Start(2 * Scratch::Bytes<uint8_t>(block_size) + Scratch::Bytes<float>(num_values) +
                  2 * Scratch::Bytes<float>(outputs * width));
    uint8_t* high = scratch.Take<uint8_t>(block_size);
    uint8_t* low = scratch.Take<uint8_t>(block_size);
    float* values = scratch.Take<float>(num_values);
    float* group_sums = scratch.Take<float>(outputs * width);
    float* totals = scratch.Take<float>(outputs * width);
    std::fill(totals, totals + outputs * width, 0.0f);

    for (const Segment& segment : segments_) {
      if (segment.first) std::fill(group_sums, group_sums + outputs * width, 0.0f);
      for (int64_t word = segment.start; word < segment.stop; word += block_words) {
        const int64_t stop = std::min(word + block_words, segment.stop);
        if (block.layers[0] > 0) {
          kernels_.unpack(Words(0, block.layers[0], word, stop, first_channel, channels), width, high);
        }
        if (block.layers[1] > 0) {
          kernels_.unpack(Words(1, block.layers[1], word, stop, first_channel, channels), width, low);
        }
        for (const MaskedRows& run : block.columns[0]) {
          if (from_codes) {
            kernels_.float_codes(high, stop - word, width, run.layers,
                                 panel.values + (block.first_row + run.first_row) * padded_k_ + word * kWordBits,
                                 padded_k_, run.rows, group_sums + run.first_sum * width);
            continue;
          }
          kernels_.values(high, run.layers > kLimbBits ? low : nullptr, stop - word, width, run.layers, values);
          kernels_.float_dot(values, (stop - word) * kWordBits, width,
                             panel.values + (block.first_row + run.first_row) * padded_k_ + word * kWordBits,
                             padded_k_, run.rows, group_sums + run.first_sum * width);
        }
      }
      if (!segment.last) continue;
      for (int64_t i = 0; i < outputs; ++i) {
        const Output& output = block.outputs[i];
        AddGroup(segment.group, output.count, 1.0f, first_channel, channels, group_sums + output.sums[0] * width,
                 totals + i * width);
      }
    }
    Finish(panel, block, first_channel, channels, width, totals);
  }

  void AddGroup(int64_t group, int count, float factor, int64_t first_channel, int64_t channels,
                const float* group_sum, float* total) const {
    const int64_t row = std::min<int64_t>({count, problem_.bits, kNumScales}) - 1;
    const float* scale = operands_.scale + (row * problem_.groups() + group) * problem_.n + first_channel;
    const auto add = problem_.groups() == 1 ? kernels_.scale_only : kernels_.scale_add;
    add(group_sum, scale, factor, channels, total);
  }

  void Finish(const Panel& panel, const RowBlock& block, int64_t first_channel, int64_t channels, int64_t width,
              const float* totals) const {
    for (size_t i = 0; i < block.outputs.size(); ++i) {
      const Output& output = block.outputs[i];
      const int64_t row = block.first_row + output.row;
      kernels_.finish_row(totals + i * width, panel.unit[row], panel.poison[row], channels, output.y + first_channel);
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
