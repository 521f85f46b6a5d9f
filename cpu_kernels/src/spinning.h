// Threads that have worked on a loop and stay awake for the next one.
//
// A pool's thread that sleeps takes tens of microseconds to come, and its caller as many to wake it: as long as a small
// product. So a helper spins for a block time (as OpenMP's libraries call it) before it goes back to its pool.
#ifndef PBJAX_SPINNING_H_
#define PBJAX_SPINNING_H_

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace pbjax {

// Tells the processor that this thread waits for another.
inline void Pause() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

// Work that any number of threads may share.
class Loop {
 public:
  virtual ~Loop() = default;
  virtual void Work() = 0;  // until nothing is left to begin
};

// All that spin, whichever pools they come from.
class SpinningHelpers {
 public:
  static SpinningHelpers& Get() {
#if defined(__unix__) || defined(__APPLE__)
    // None of them is in the child of a fork, where others may have their stacks.
    [[maybe_unused]] static const int registered =
        pthread_atfork(nullptr, nullptr, [] { Current() = new SpinningHelpers; });
#endif
    return *Current();
  }

  // Sets up to `most` of them to work on a loop. Returns how many.
  int64_t Start(const std::shared_ptr<Loop>& loop, int64_t most) {
    // Whoever finds the lock taken does without: a caller never sleeps here.
    if (first_.load(std::memory_order_relaxed) == nullptr || !mutex_.try_lock()) return 0;
    std::lock_guard<std::mutex> lock(mutex_, std::adopt_lock);
    int64_t started = 0;
    for (; started < most && first_ != nullptr; ++started) {
      Helper* helper = first_;
      first_ = helper->next;
      helper->loop = loop;
      helper->is_started.store(true, std::memory_order_release);  // the helper may be gone from here on
    }
    return started;
  }

  // Works on loops as they come, until none has come for the block time, unless `most` threads do so: more would take their
  // cores from each other. Other threads that want this core get it.
  void Spin(int64_t most) {
    if (awake_.fetch_add(1, std::memory_order_relaxed) < most) WorkOnLoops();
    awake_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  using Clock = std::chrono::steady_clock;

  void WorkOnLoops() {
    while (Clock::now().time_since_epoch() >= Clock::duration(rest_until_.load(std::memory_order_relaxed))) {
      Helper self;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        self.next = first_;
        first_ = &self;
      }
      const Clock::time_point end = Clock::now() + kBlockTime;
      while (!self.is_started.load(std::memory_order_acquire)) {
        for (int i = 0; i < kPauses && !self.is_started.load(std::memory_order_relaxed); ++i) Pause();
        std::this_thread::yield();
        if (Clock::now() > end && Leave(&self)) return;
      }
      rest_.store(0, std::memory_order_relaxed);
      self.loop->Work();
    }
  }

  static SpinningHelpers*& Current() {
    static SpinningHelpers* helpers = new SpinningHelpers;  // never destroyed: threads outlive static objects
    return helpers;
  }

  // From one call of a jitted product to the next pass about 100 us, of 2 cores that have other data in their caches, and
  // a helper can be done 100 us before its caller.
  static constexpr std::chrono::microseconds kBlockTime{400};
  // After one that waited in vain nobody does for a while, twice as long each time: little is lost where calls are far apart
  // or where work of others fills the time between them.
  static constexpr Clock::duration kFirstRest = kBlockTime, kLongestRest = std::chrono::milliseconds(64);
  static constexpr int kPauses = 16;  // about a microsecond

  struct Helper {
    std::atomic<bool> is_started{false};
    std::shared_ptr<Loop> loop;
    Helper* next = nullptr;
  };

  // False if a loop has come after all.
  bool Leave(Helper* self) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (self->is_started.load(std::memory_order_relaxed)) return false;
    if (first_ == self) {
      first_ = self->next;
    } else {
      Helper* before = first_;
      while (before->next != self) before = before->next;
      before->next = self->next;
    }
    const Clock::duration now = Clock::now().time_since_epoch();
    if (now.count() >= rest_until_.load(std::memory_order_relaxed)) {  // else others have waited with it
      const Clock::duration rest(rest_.load(std::memory_order_relaxed));
      rest_.store(std::clamp(2 * rest, kFirstRest, kLongestRest).count(), std::memory_order_relaxed);
      rest_until_.store((now + Clock::duration(rest_.load(std::memory_order_relaxed))).count(), std::memory_order_relaxed);
    }
    return true;
  }

  std::mutex mutex_;
  std::atomic<Helper*> first_{nullptr};
  std::atomic<int64_t> awake_{0};
  std::atomic<Clock::rep> rest_{0}, rest_until_{0};
};

}  // namespace pbjax

#endif  // PBJAX_SPINNING_H_
