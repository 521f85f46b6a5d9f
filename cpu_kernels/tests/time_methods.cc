// Times of every method that a table has, as CSV: the source of the tables of choices.
//
//   pbjax_time_methods [size] [table]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"
#include "matmul.h"
#include "pool.h"
#include "problem.h"

namespace pbjax {
namespace {

struct Buffers {
  std::vector<float> x, scale, y;
  std::vector<uint32_t> words;
  size_t offset = 0;  // of the first word, aligned to 64 bytes as XLA's are

  void ResizeWords(size_t count) {
    words.resize(count + 16);
    offset = (64 - reinterpret_cast<uintptr_t>(words.data()) % 64) % 64 / sizeof(uint32_t);
  }
};

const char* Name(Method method) {
  switch (method) {
    case Method::kBlocks: return "blocks";
    case Method::kStream: return "stream";
    case Method::kCodes: return "codes";
    case Method::kLookup: return "lookup";
  }
  return "";
}

// Microseconds of a call, the median of many in a row.
double Time(const Problem& problem, Buffers& buffers, const Kernels& kernels, int count, Pool& pool) {
  std::vector<int32_t> counts(problem.prefixes ? 1 : problem.m, count);
  const Operands operands = {buffers.x.data(), buffers.words.data() + buffers.offset, buffers.scale.data(), counts.data(),
                             buffers.y.data()};
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  const auto end = Clock::now() + std::chrono::milliseconds(60);
  while (times.size() < 5 || Clock::now() < end) {
    const auto start = Clock::now();
    Matmul(problem, operands, kernels, pool);
    times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace
}  // namespace pbjax

int main(int argc, char** argv) {
  using namespace pbjax;
  const int64_t size = argc > 1 ? std::atoll(argv[1]) : 4096;
  const char* name = argc > 2 ? argv[2] : "";
  const Kernels* table = FindKernels(name, std::strlen(name));
  if (table == nullptr) {
    std::fprintf(stderr, "no kernels named %s on this machine\n", name);
    return 1;
  }
  constexpr int64_t kRows = 16, kBits = 8;
  std::mt19937_64 random(0);
  std::normal_distribution<float> normal;
  Buffers buffers;
  buffers.x.resize(kRows * size);
  for (float& x : buffers.x) x = normal(random);
  buffers.scale.assign(4 * size, 1.0f);
  buffers.y.resize(kBits * kRows * size);
  buffers.ResizeWords(kBits * (size / 32) * size);
  for (uint32_t& word : buffers.words) word = static_cast<uint32_t>(random());
  Pool pool(std::thread::hardware_concurrency());
  std::printf("instructions,threads,k,n,m,activation_bits,sweep,bitlayers,method,median_us\n");
  for (const bool sweep : {false, true}) {
    for (const int activation_bits : {8, 16, 24, 0}) {
      for (const int64_t m : {1, 2, 4, 8, 16}) {
        for (const int count : {1, 2, 4, 6, 8}) {
          if (sweep && count < 8) continue;
          for (const Method method : {Method::kBlocks, Method::kStream, Method::kCodes, Method::kLookup}) {
            const bool is_float = activation_bits == 0;
            if (method == Method::kStream && (is_float || table->stream == nullptr || m > kStreamRows || sweep)) continue;
            if (method == Method::kCodes && (!is_float || table->float_codes == nullptr || m > kFewRows)) continue;
            if (method == Method::kLookup && (is_float ? (void*)table->float_lookup : (void*)table->lookup) == nullptr) continue;
            Kernels kernels = *table;
            const Problem problem = {m, size, size, kBits, 0, activation_bits, RowType::kFloat32, sweep};
            const Choice choice = {problem.limbs(), sweep, kRows, kBits, method};
            kernels.choices = &choice;
            kernels.num_choices = 1;
            std::printf("%s,%ld,%ld,%ld,%ld,%d,%d,%d,%s,%.1f\n", table->name, (long)pool.num_threads(), (long)size,
                        (long)size, (long)m, activation_bits, sweep, count, Name(method),
                        Time(problem, buffers, kernels, count, pool));
          }
        }
      }
    }
  }
  return 0;
}
