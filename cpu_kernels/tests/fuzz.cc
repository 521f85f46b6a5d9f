// Random products on every set of kernels of this machine, by every method, against the definition, written out here in
// scalar integers.
//
//   pbjax_fuzz [cases] [seed]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels.h"
#include "matmul.h"
#include "problem.h"

namespace pbjax {

const Kernels* EmulatedAmxKernels();  // emulated_amx.cc, for machines with AVX-512's VNNI, GFNI and VBMI

namespace {

// Threads of the test's own; some tasks run at once in the caller, and some only after the product has ended.
class TestScheduler : public Scheduler {
 public:
  TestScheduler(int64_t num_threads, bool late) : num_threads_(num_threads), late_(late) {}
  ~TestScheduler() override { Join(); }
  int64_t num_threads() const override { return num_threads_; }
  void Schedule(std::function<void()> task) override {
    if (late_) {
      tasks_.push_back(std::move(task));
    } else {
      threads_.emplace_back(std::move(task));
    }
  }
  void Join() {
    for (auto& task : tasks_) task();
    for (auto& thread : threads_) thread.join();
    tasks_.clear();
    threads_.clear();
  }

 private:
  int64_t num_threads_;
  bool late_;
  std::vector<std::thread> threads_;
  std::vector<std::function<void()>> tasks_;
};

struct Case {
  Problem problem;
  std::vector<int32_t> codes;  // rows of fixed point
  std::vector<float> rows;
  std::vector<uint16_t> narrow;
  std::vector<uint32_t> words;
  std::vector<float> scale;
  std::vector<int32_t> counts;

  int Bit(int64_t bitlayer, int64_t k, int64_t channel) const {
    const int64_t word = (bitlayer * problem.num_words() + k / 32) * problem.n + channel;
    return words[word] >> (k % 32) & 1;
  }
  const void* x() const {
    if (problem.row_type == RowType::kCodes) return codes.data();
    if (problem.row_type == RowType::kFloat32) return rows.data();
    return narrow.data();
  }
};

// The steps of activations.quantize_rows for one row, with its long division.
bool QuantizeRow(const float* x, int64_t k, int bits, int64_t* codes, float* unit) {
  float magnitude = 0;
  bool finite = true;
  for (int64_t i = 0; i < k; ++i) {
    finite = finite && std::isfinite(x[i]);
    magnitude = std::max(magnitude, std::fabs(x[i]));
  }
  if (!finite) magnitude = 0;
  magnitude = std::max(magnitude, std::ldexp(1.0f, -100));
  const int64_t top = (int64_t{1} << (bits - 1)) - 1;
  int exponent;
  const int64_t significand = std::ldexp(std::frexp(magnitude, &exponent), 24);
  exponent -= 1;
  const int limited = std::min(exponent, 126);
  volatile float inverse = static_cast<float>((int64_t{1} << 47) / significand) * std::ldexp(static_cast<float>(top), -24);
  inverse = inverse * std::ldexp(1.0f, limited - exponent);
  for (int64_t i = 0; i < k; ++i) {
    volatile float scaled = (finite ? x[i] : 0.0f) * std::ldexp(1.0f, -limited);
    scaled = scaled * inverse;
    const int64_t code = static_cast<int64_t>(std::nearbyint(scaled));
    codes[i] = std::min(std::max(code, -top), top);
  }
  *unit = magnitude * static_cast<float>((top + 1) / (2.0 * top));
  return finite;
}

float High(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits &= 0xFFFFF000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

// One result of fixed-point activations: contract.py and epilogue.py, one operation at a time.
float FixedPoint(const Case& given, const int64_t* codes, int count, int64_t channel) {
  const Problem& problem = given.problem;
  volatile float total = 0;
  const int limbs = problem.limbs();
  const int64_t group_k = problem.group_size == 0 ? std::max<int64_t>(problem.k, 1) : problem.group_size;
  for (int64_t group = 0; group < problem.groups(); ++group) {
    volatile float sum = 0;
    const int64_t end = std::min((group + 1) * group_k, problem.k);
    for (int64_t start = group * group_k; start < end; start += kMaxExactK) {
      const int64_t stop = std::min(start + kMaxExactK, end);
      volatile float value = 0;
      for (int first = 0; first < count; first += 8) {
        const int width = std::min(count - first, 8);
        volatile float column = 0;
        for (int limb = 0; limb < limbs; ++limb) {
          int64_t exact = 0;
          for (int64_t i = start; i < stop; ++i) {
            int64_t code = 0;
            for (int bit = 0; bit < width; ++bit) code = 2 * code + given.Bit(first + bit, i, channel);
            const int64_t shifted = codes[i] >> (8 * (limbs - 1 - limb));
            exact += (limb == 0 ? shifted : shifted & 255) * (2 * code - ((1 << width) - 1));
          }
          column = column * 256.0f;
          column = column + static_cast<float>(static_cast<int32_t>(exact));
        }
        value = value * std::ldexp(1.0f, first == 0 ? 0 : width);
        value = value + column;
      }
      sum = sum + value;
    }
    const int64_t row = std::min<int64_t>(std::min<int64_t>(problem.bits, 4), count) - 1;
    const float scale = given.scale[(row * problem.groups() + group) * problem.n + channel];
    sum = sum * std::ldexp(1.0f, 2 - problem.activation_bits - count);
    if (problem.groups() == 1) return sum * scale;
    const float scale_high = High(scale), scale_low = scale - scale_high;
    const float sum_high = High(sum), sum_low = sum - sum_high;
    for (const auto& [a, b] : {std::pair(scale_low, sum_low), std::pair(scale_low, sum_high),
                               std::pair(scale_high, sum_low), std::pair(scale_high, sum_high)}) {
      volatile float product = a * b;
      total = total + product;
    }
  }
  return total;
}

double Float(const Case& given, const float* x, int count, int64_t channel, double* magnitude) {
  const Problem& problem = given.problem;
  double total = 0;
  *magnitude = 0;
  for (int64_t i = 0; i < problem.k; ++i) {
    double value = 0;
    for (int bit = 0; bit < count; ++bit) value += std::ldexp(2 * given.Bit(bit, i, channel) - 1, -bit - 1);
    const int64_t group = problem.group_size == 0 ? 0 : i / problem.group_size;
    const int64_t row = std::min<int64_t>(std::min<int64_t>(problem.bits, 4), count) - 1;
    const double scale = given.scale[(row * problem.groups() + group) * problem.n + channel];
    total += scale * value * x[i];
    *magnitude += std::fabs(scale * x[i]);
  }
  return total;
}

uint16_t ToBFloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits >> 16;
}

float FromBFloat16(uint16_t narrow) {
  const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A float16 of small integers and quarters, by its definition.
uint16_t ToFloat16(int exponent, int fraction, bool negative) { return negative << 15 | exponent << 10 | fraction; }

float FromFloat16(uint16_t narrow) {
  const int exponent = narrow >> 10 & 31, fraction = narrow & 1023;
  const float value = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return narrow >> 15 ? -value : value;
}

template <typename Random>
Case MakeCase(Random& random) {
  const auto pick = [&](std::initializer_list<int64_t> values) {
    return values.begin()[random() % values.size()];
  };
  const auto between = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
  };
  Case given;
  Problem& problem = given.problem;
  problem = {};
  const int64_t kind = between(0, 999);
  problem.m = pick({1, 1, 1, 2, 3, 5, 7, 8, 16});
  problem.k = kind == 0 ? pick({40000, 65536 + 33}) : pick({1, 2, 31, 32, 33, 64, 65, 95, 130, 200});
  problem.n = kind == 0 ? between(1, 5) : pick({1, 2, 3, 15, 16, 17, 33, 64, 65});
  if (kind >= 990) problem.m = between(20, 150), problem.k = between(1, 70), problem.n = between(1, 20);
  if (kind >= 970 && kind < 990) problem.m = pick({1, 1, 2}), problem.n = between(100, 1100);  // whole widths of a task
  problem.bits = between(1, 16);
  problem.group_size = pick({0, 0, 32, 64, 96});
  if (kind == 0) problem.group_size = pick({0, 32800});
  problem.activation_bits = static_cast<int>(pick({0, 1, 1, 1})) * static_cast<int>(between(2, 24));
  problem.row_type = static_cast<RowType>(problem.activation_bits == 0 ? between(1, 3) : pick({0, 0, 1, 1, 2, 3}));
  problem.prefixes = pick({0, 0, 1}) != 0 && kind != 0;
  given.words.resize(problem.bits * problem.num_words() * problem.n);
  const int64_t fill = between(0, 9);
  for (auto& word : given.words) word = fill == 0 ? 0xFFFFFFFFu : fill == 1 ? 0 : static_cast<uint32_t>(random());
  given.scale.resize(std::min<int64_t>(problem.bits, 4) * problem.groups() * problem.n);
  for (auto& scale : given.scale) {  // some of them of groups of zeros
    scale = between(0, 15) == 0 ? 0.0f : std::ldexp(1.0f + (random() % 8388608) / 8388608.0f, between(-3, 3));
  }
  given.counts.resize(problem.prefixes ? 1 : problem.m);
  const bool same = between(0, 1) == 0;
  for (auto& count : given.counts) count = same ? given.counts[0] : between(1, problem.bits);
  if (same) for (auto& count : given.counts) count = 1 + given.words[0] % problem.bits;
  const int64_t size = problem.m * problem.k, top = (int64_t{1} << (std::max(problem.activation_bits, 2) - 1)) - 1;
  const int64_t extreme = between(0, 3);
  // Sums of floats have a bound only between overflow and underflow; fixed point is exact in all of float32.
  const bool fixed = problem.activation_bits > 0;
  const int exponent = static_cast<int>(fixed ? pick({0, 0, 0, -140, -110, 100, 126}) : pick({0, -60, 60}));
  for (int64_t i = 0; i < size; ++i) {
    given.codes.push_back(extreme == 0 ? (random() % 2 ? top : -top) : between(-top, top));
    given.rows.push_back(std::ldexp(between(-8388608, 8388608) / 8388608.0f, exponent));
    if (problem.row_type == RowType::kBFloat16) given.narrow.push_back(ToBFloat16(given.rows.back()));
    if (problem.row_type == RowType::kFloat16) {
      given.narrow.push_back(ToFloat16(between(0, 30), between(0, 1023), random() % 2 != 0));
    }
    if (problem.row_type == RowType::kBFloat16) given.rows.back() = FromBFloat16(given.narrow.back());
    if (problem.row_type == RowType::kFloat16) given.rows.back() = FromFloat16(given.narrow.back());
  }
  if (problem.row_type == RowType::kFloat32 && problem.m > 1 && between(0, 3) == 0) {
    given.rows[between(0, size - 1)] = pick({0, 1}) ? INFINITY : NAN;
  }
  return given;
}

// To the last bit: -0 is not 0. One NaN is as good as another.
bool Same(float a, float b) { return (a == b && std::signbit(a) == std::signbit(b)) || (std::isnan(a) && std::isnan(b)); }

// Returns the number of wrong results.
int Check(const Case& given, const Kernels& kernels, Scheduler& scheduler) {
  const Problem& problem = given.problem;
  const int64_t plane = problem.m * problem.n;
  std::vector<float> y(plane * (problem.prefixes ? problem.bits : 1), -7.0f);
  Matmul(problem, {given.x(), given.words.data(), given.scale.data(), given.counts.data(), y.data()}, kernels,
         scheduler);
  int wrong = 0;
  std::vector<int64_t> codes(problem.k);
  for (int64_t row = 0; row < problem.m; ++row) {
    const float* x = given.rows.data() + row * problem.k;
    float unit = 1;
    bool finite = true;
    if (problem.row_type == RowType::kCodes) {
      for (int64_t i = 0; i < problem.k; ++i) codes[i] = given.codes[row * problem.k + i];
    } else if (problem.activation_bits > 0) {
      finite = QuantizeRow(x, problem.k, problem.activation_bits, codes.data(), &unit);
    } else {
      for (int64_t i = 0; i < problem.k; ++i) finite = finite && std::isfinite(x[i]);
    }
    const int first = problem.prefixes ? 1 : given.counts[row];
    const int last = given.counts[problem.prefixes ? 0 : row];
    for (int count = first; count <= last; ++count) {
      for (int64_t channel = 0; channel < problem.n; ++channel) {
        const float got = y[(problem.prefixes ? (count - 1) * plane : 0) + row * problem.n + channel];
        bool right;
        double expected;
        if (problem.activation_bits > 0) {
          volatile float value = FixedPoint(given, codes.data(), count, channel);
          if (problem.row_type != RowType::kCodes) value = std::fma(value, unit, 0.0f);
          expected = finite ? value : NAN;
          right = Same(got, static_cast<float>(expected));
        } else {
          double magnitude;
          expected = finite ? Float(given, x, count, channel, &magnitude) : NAN;
          const double operations = problem.k + problem.bits + problem.groups() + 4;
          right = finite ? std::fabs(got - expected) <= operations * 0x1p-24 / (1 - operations * 0x1p-24) * magnitude +
                                                             std::ldexp(problem.k, -149)
                         : std::isnan(got);
        }
        if (!right && ++wrong == 1) {
          std::printf("%s: m %ld k %ld n %ld bits %ld group %ld activation_bits %d rows %d prefixes %d: row %ld "
                      "channel %ld at %d bitlayers is %a, not %a\n",
                      kernels.name, (long)problem.m, (long)problem.k, (long)problem.n, (long)problem.bits,
                      (long)problem.group_size, problem.activation_bits, (int)problem.row_type, problem.prefixes,
                      (long)row, (long)channel, count, got, expected);
        }
      }
    }
  }
  return wrong;
}

}  // namespace
}  // namespace pbjax

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 20000;
  const uint64_t seed = argc > 2 ? std::atoll(argv[2]) : 0;
  std::mt19937_64 random(seed);
  std::vector<const pbjax::Kernels*> tables(pbjax::kMaxTables);
  tables.resize(pbjax::FindTables(tables.data()));
  if (pbjax::FindKernels("avx512", 6) != nullptr) tables.push_back(pbjax::EmulatedAmxKernels());
  int64_t wrong = 0, products = 0;
  for (int64_t i = 0; i < cases && wrong < 20; ++i) {
    const pbjax::Case given = pbjax::MakeCase(random);
    for (const pbjax::Kernels* table : tables) {
      const bool threads = random() % 64 == 0;
      pbjax::TestScheduler scheduler(threads ? 4 : random() % 2 ? 1 : 3, !threads);
      // By the table of choices, or by any method; one that a table does not have falls back to blocks.
      pbjax::Kernels kernels = *table;
      const pbjax::Method methods[] = {pbjax::Method::kBlocks, pbjax::Method::kStream, pbjax::Method::kCodes,
                                       pbjax::Method::kLookup};
      const pbjax::Choice any = {given.problem.limbs(), given.problem.prefixes, given.problem.m, pbjax::kMaxBits,
                                 methods[random() % 4]};
      if (random() % 2 != 0) {
        kernels.choices = &any;
        kernels.num_choices = 1;
      }
      wrong += pbjax::Check(given, kernels, scheduler) != 0;
      ++products;
    }
  }
  std::string names;
  for (const pbjax::Kernels* table : tables) names += std::string(" ") + table->name;
  std::printf("%ld of %ld products wrong, seed %lu, kernels:%s\n", (long)wrong, (long)products, (unsigned long)seed,
              names.c_str());
  return wrong == 0 ? 0 : 1;
}
