// A loop over tasks on somebody else's threads, which never waits for a thread that has not come.
#ifndef PBJAX_PARALLEL_H_
#define PBJAX_PARALLEL_H_

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <new>
#include <thread>

#include "spinning.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace pbjax {

// Threads that may or may not run what they are given: a pool can be busy, and can run a task in its caller.
class Scheduler {
 public:
  virtual ~Scheduler() = default;
  virtual int64_t num_threads() const = 0;
  virtual void Schedule(std::function<void()> task) = 0;
};

// How floating-point operations treat denormals, which XLA sets for its own threads' time.
class FloatMode {
 public:
#if defined(__SSE2__)
  static FloatMode Current() { return FloatMode(_mm_getcsr()); }
  void Set() const { _mm_setcsr(bits_ & ~0x3Fu); }  // without the flags of past exceptions
#else
  static FloatMode Current() { return FloatMode(0); }
  void Set() const {}
#endif

 private:
  explicit FloatMode(unsigned bits) : bits_(bits) {}
  unsigned bits_;
};

// Calls run(0), .., run(tasks - 1), each once, in any order, on this thread and on as many others as come in time.
template <typename Run>
void ParallelFor(Scheduler& scheduler, int64_t tasks, const Run& run) {
  const int64_t most = scheduler.num_threads() - 1, helpers = std::min(most, tasks - 1);
  if (helpers <= 0) {
    for (int64_t i = 0; i < tasks; ++i) run(i);
    return;
  }
  // Shared with helpers that come after the end: they find no task left, and `run` is not touched then.
  class Tasks : public Loop {
   public:
    Tasks(const Run& run, int64_t tasks) : run_(run), tasks_(tasks) {}
    void Work() override {
      const FloatMode own = FloatMode::Current();
      mode_.Set();
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) {
        try {
          run_(i);
        } catch (const std::bad_alloc&) {  // must not leave a thread that is not ours
          out_of_memory_.store(true, std::memory_order_relaxed);
        }
        done_.fetch_add(1, std::memory_order_release);
      }
      own.Set();
    }
    void Wait() const {
      for (int spins = 0; done_.load(std::memory_order_acquire) < tasks_; ++spins) {
        if (spins > 1000) {
          std::this_thread::yield();
        } else {
          Pause();
        }
      }
      if (out_of_memory_.load(std::memory_order_relaxed)) throw std::bad_alloc();
    }

   private:
    const Run& run_;
    const int64_t tasks_;
    const FloatMode mode_ = FloatMode::Current();
    std::atomic<int64_t> next_{0}, done_{0};
    std::atomic<bool> out_of_memory_{false};
  };
  const auto loop = std::make_shared<Tasks>(run, tasks);
  const std::thread::id caller = std::this_thread::get_id();
  for (int64_t i = SpinningHelpers::Get().Start(loop, helpers); i < helpers; ++i) {
    scheduler.Schedule([loop, caller, most] {
      loop->Work();
      if (std::this_thread::get_id() != caller) SpinningHelpers::Get().Spin(most);
    });
  }
  loop->Work();
  loop->Wait();
}

}  // namespace pbjax

#endif  // PBJAX_PARALLEL_H_
