#include "activations.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace pbjax {
namespace {

constexpr int64_t kPrepareWork = 1 << 14;  // activations that one task prepares

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

// Copies a row, in units of `unit`: kernels may sum up to 2**31 times the row, so rows of large values are scaled down,
// exactly. Returns false, and zeros, where it is not finite.
bool CopyFloats(const float* x, int64_t k, int64_t padded_k, float* values, float* unit) {
  std::fill(values + k, values + padded_k, 0.0f);
  bool finite = true, large = false;
  for (int64_t i = 0; i < k; ++i) {
    finite = finite & (std::abs(x[i]) <= std::numeric_limits<float>::max());
    large = large | (std::abs(x[i]) >= 0x1p64f);
  }
  if (finite && large) *unit = 0x1p64f;
  const float factor = finite ? 1.0f / *unit : 0.0f;
  for (int64_t i = 0; i < k; ++i) values[i] = finite ? x[i] * factor : 0.0f;
  return finite;
}

}  // namespace

std::vector<Segment> MakeSegments(const Problem& problem) {
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

int64_t RowBytes(const Problem& problem) {
  return std::max<int64_t>(1, problem.num_words() * kWordBits * (problem.limbs() == 0 ? 4 : problem.limbs()));
}

Panel MakePanel(const Problem& problem, const Operands& operands, const Kernels& kernels, Scheduler& scheduler,
                const std::vector<Segment>& segments, int64_t rows, const int64_t* source, const int32_t* counts,
                int64_t first_lookup, Scratch& scratch) {
  const int limbs = problem.limbs();
  const bool is_float = limbs == 0;
  const int64_t words = problem.num_words(), padded_k = words * kWordBits;
  const int64_t num_segments = static_cast<int64_t>(segments.size());
  Panel panel = {};
  panel.rows = rows;
  panel.source = source;
  panel.counts = counts;
  panel.limb_stride = padded_k + 64;
  panel.first_lookup = first_lookup;
  const int64_t limb_bytes = rows * limbs * panel.limb_stride, num_sums = rows * num_segments * limbs;
  const int64_t num_values = is_float ? rows * padded_k : 0;
  const int64_t table_bytes = (rows - first_lookup) * words * limbs * kTableBytes;
  const int64_t table_floats = is_float ? (rows - first_lookup) * words * kTableFloats : 0;
  scratch.Start(Scratch::Bytes<uint8_t>(limb_bytes) + Scratch::Bytes<int32_t>(num_sums) +
                Scratch::Bytes<float>(num_values) + Scratch::Bytes<uint8_t>(table_bytes) +
                Scratch::Bytes<float>(table_floats) + 2 * Scratch::Bytes<float>(rows));
  panel.limbs = scratch.Take<uint8_t>(limb_bytes);
  panel.limb_sums = scratch.Take<int32_t>(num_sums);
  panel.values = scratch.Take<float>(num_values);
  panel.tables = scratch.Take<uint8_t>(table_bytes);
  panel.float_tables = scratch.Take<float>(table_floats);
  panel.unit = scratch.Take<float>(rows);
  panel.poison = scratch.Take<float>(rows);

  const auto prepare = [&](int64_t row) {
    thread_local Scratch converted;
    bool finite = true;
    panel.unit[row] = 1.0f;
    uint8_t* bytes = panel.limbs + row * limbs * panel.limb_stride;
    if (problem.row_type == RowType::kCodes) {
      kernels.split(static_cast<const int32_t*>(operands.x) + source[row] * problem.k, problem.k, padded_k, limbs,
                    bytes, panel.limb_stride);
    } else {
      converted.Start(Scratch::Bytes<float>(problem.k));
      const float* x = FloatRow(problem, operands.x, source[row], converted.Take<float>(problem.k));
      finite = is_float ? CopyFloats(x, problem.k, padded_k, panel.values + row * padded_k, panel.unit + row)
                        : kernels.quantize(x, problem.k, padded_k, problem.activation_bits, bytes, panel.limb_stride,
                                           panel.unit + row);
    }
    const float zero = problem.row_type == RowType::kCodes ? -0.0f : 0.0f;
    panel.poison[row] = finite ? zero : std::numeric_limits<float>::quiet_NaN();
    for (int64_t s = 0; s < num_segments; ++s) {
      for (int limb = 0; limb < limbs; ++limb) {
        panel.limb_sums[(row * num_segments + s) * limbs + limb] =
            kernels.sum(bytes + limb * panel.limb_stride + segments[s].start * kWordBits,
                        (segments[s].stop - segments[s].start) * kWordBits, limb == 0);
      }
    }
    const int64_t lookup = row - first_lookup;
    if (lookup < 0) return;
    if (is_float) {
      kernels.make_float_tables(panel.values + row * padded_k, words, panel.float_tables + lookup * words * kTableFloats);
    }
    if (limbs > 0) {
      kernels.make_tables(bytes, panel.limb_stride, limbs, words, panel.tables + lookup * words * limbs * kTableBytes);
    }
  };
  const int64_t rows_per_task = std::max<int64_t>(1, kPrepareWork / std::max<int64_t>(1, padded_k));
  ParallelFor(scheduler, (rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    const int64_t stop = std::min(rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < stop; ++row) prepare(row);
  });
  return panel;
}

}  // namespace pbjax
