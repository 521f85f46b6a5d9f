// Loops over tasks, from several threads at once and with helpers that spin between them: every task runs once.
//
//   pbjax_loops [loops]
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
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

// A thread that spins is started on a loop, and works on it; one that waits in vain comes back to its caller.
bool SpinningHelpersHelp() {
  struct Once : Loop {
    void Work() override { worked_by.store(std::this_thread::get_id()); }
    std::atomic<std::thread::id> worked_by{std::thread::id()};
  };
  std::atomic<bool> stop{false};
  std::atomic<int64_t> returns{0};
  std::thread helper([&] {
    while (!stop) {
      SpinningHelpers::Get().Spin(1);
      ++returns;
    }
  });
  int64_t right = 0;
  for (int i = 0; i < 1000; ++i) {
    const auto loop = std::make_shared<Once>();
    while (SpinningHelpers::Get().Start(loop, 2) == 0) std::this_thread::yield();
    while (loop->worked_by.load() == std::thread::id()) std::this_thread::yield();
    right += loop->worked_by.load() == helper.get_id();
  }
  const int64_t before = returns;
  while (returns == before) std::this_thread::yield();
  stop = true;
  helper.join();
  std::printf("%ld of 1000 loops were worked on by the helper that spins\n", (long)right);
  return right == 1000;
}

// Of two threads that would spin, as many are started at once as may spin.
bool NoMoreSpin() {
  struct Nothing : Loop {
    void Work() override {}
  };
  bool right = true;
  for (const int64_t most : {1, 2}) {
    std::atomic<bool> stop{false};
    std::vector<std::thread> helpers;
    for (int i = 0; i < 2; ++i) {
      helpers.emplace_back([&] {
        while (!stop) SpinningHelpers::Get().Spin(most);
      });
    }
    int64_t started = 0;
    for (int i = 0; i < 2000; ++i) {
      started = std::max(started, SpinningHelpers::Get().Start(std::make_shared<Nothing>(), 2));
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    stop = true;
    for (auto& helper : helpers) helper.join();
    std::printf("where %ld may spin, %ld of 2 threads were started\n", (long)most, (long)started);
    right &= started == most;
  }
  return right;
}

// The child of a fork has none of the helpers that spin in its parent.
bool ForkHasNone() {
  Pool pool(2);
  struct Nothing : Loop {
    void Work() override {}
  };
  int in_child = 0;
  for (int i = 0; i < 50; ++i) {
    do {
      ParallelFor(pool, 2, [](int64_t) { Work(50); });
    } while (SpinningHelpers::Get().Start(std::make_shared<Nothing>(), 1) == 0);
    Work(20);  // after which the helper that was just started spins again
    const pid_t child = fork();
    if (child == 0) _exit(static_cast<int>(SpinningHelpers::Get().Start(std::make_shared<Nothing>(), 1)));
    int status = 0;
    waitpid(child, &status, 0);
    in_child += status != 0;
  }
  std::printf("helpers were there in %d of 50 children\n", in_child);
  return in_child == 0;
}

}  // namespace
}  // namespace pbjax

int main(int argc, char** argv) {
  const int64_t loops = argc > 1 ? std::atoll(argv[1]) : 20000;
  std::atomic<int64_t> wrong{0};
  {
    pbjax::Pool pools[2] = {pbjax::Pool(3), pbjax::Pool(5)};
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
      callers.emplace_back([&, i] { wrong += pbjax::WrongLoops(pools[i % 2], loops, i); });
    }
    for (auto& caller : callers) caller.join();
  }
  std::printf("%ld of %ld loops wrong\n", (long)wrong, (long)(4 * loops));
  return wrong != 0 || !pbjax::SpinningHelpersHelp() || !pbjax::ForkHasNone() || !pbjax::NoMoreSpin();
}
