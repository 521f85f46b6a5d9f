// Loops over tasks, from several threads at once and with helpers that spin between them: every task runs once.
//
//   pbjax_loops [loops]
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "parallel.h"
#include "pool.h"

namespace pbjax {
namespace {

void Work(int64_t microseconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
  while (std::chrono::steady_clock::now() < end) Pause();
}

// How many of these loops did not run each task once, or did not say that one was out of memory.
int64_t WrongLoops(Scheduler& scheduler, int64_t loops, uint64_t seed) {
  std::mt19937_64 random(seed);
  int64_t wrong = 0;
  for (int64_t i = 0; i < loops; ++i) {
    std::vector<std::atomic<int>> runs(1 + random() % 9);
    const int64_t failing = random() % 16 == 0 ? static_cast<int64_t>(random() % runs.size()) : -1;
    const int64_t work = random() % 4 == 0 ? random() % 20 : 0;
    bool failed = false;
    try {
      ParallelFor(scheduler, static_cast<int64_t>(runs.size()), [&](int64_t task) {
        Work(work);
        ++runs[task];
        if (task == failing) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    bool all = true;
    for (const auto& count : runs) all &= count == 1;
    // A loop on one thread ends with the task that fails.
    if (failed != (failing >= 0) || (!all && !failed)) ++wrong;
    if (random() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 400));
  }
  return wrong;
}

// Drops all that it is given but for one task in a hundred.
class Forgetful : public Scheduler {
 public:
  explicit Forgetful(Scheduler& scheduler) : scheduler_(scheduler) {}
  int64_t num_threads() const override { return scheduler_.num_threads(); }
  void Schedule(std::function<void()> task) override {
    if (scheduled_++ % 100 == 0) {
      ++passed_on_;
      scheduler_.Schedule(std::move(task));
    }
  }
  int64_t passed_on() const { return passed_on_; }

 private:
  Scheduler& scheduler_;
  int64_t scheduled_ = 0, passed_on_ = 0;
};

// Loops that had help, and the helpers that were scheduled for them: fewer, if those that spin take part.
bool SpinningHelpersHelp() {
  Pool pool(2);
  Forgetful scheduler(pool);
  const std::thread::id caller = std::this_thread::get_id();
  int64_t helped = 0;
  for (int i = 0; i < 20000; ++i) {
    std::atomic<bool> by_helper{false};
    ParallelFor(scheduler, 4, [&](int64_t) {
      Work(5);
      if (std::this_thread::get_id() != caller) by_helper = true;
    });
    helped += by_helper;
  }
  std::printf("%ld loops had help, of helpers scheduled for %ld\n", (long)helped, (long)scheduler.passed_on());
  return helped > scheduler.passed_on();
}

}  // namespace
}  // namespace pbjax

int main(int argc, char** argv) {
  const int64_t loops = argc > 1 ? std::atoll(argv[1]) : 20000;
  pbjax::Pool pools[2] = {pbjax::Pool(3), pbjax::Pool(5)};
  std::atomic<int64_t> wrong{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&, i] { wrong += pbjax::WrongLoops(pools[i % 2], loops, i); });
  }
  for (auto& caller : callers) caller.join();
  std::printf("%ld of %ld loops wrong\n", (long)wrong, (long)(4 * loops));
  return wrong != 0 || !pbjax::SpinningHelpersHelp();
}
