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
  const int64_t helpers = std::min(scheduler.num_threads(), tasks) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < tasks; ++i) run(i);
    return;
  }
  // Shared with helpers that come after the end: they find no task left, and `run` is not touched then.
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> out_of_memory{false};
  };
  auto state = std::make_shared<State>();
  const Run* shared_run = &run;
  const auto work = [state, shared_run, tasks] {
    for (int64_t i; (i = state->next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      try {
        (*shared_run)(i);
      } catch (const std::bad_alloc&) {  // must not leave a thread that is not ours
        state->out_of_memory.store(true, std::memory_order_relaxed);
      }
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const FloatMode mode = FloatMode::Current();
  for (int64_t i = 0; i < helpers; ++i) {
    scheduler.Schedule([work, mode] {
      const FloatMode own = FloatMode::Current();
      mode.Set();
      work();
      own.Set();
    });
  }
  work();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < tasks; ++spins) {
    if (spins > 1000) {
      std::this_thread::yield();
    } else {
#if defined(__SSE2__)
      _mm_pause();
#endif
    }
  }
  if (state->out_of_memory.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

}  // namespace pbjax

#endif  // PBJAX_PARALLEL_H_
