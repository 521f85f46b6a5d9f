// Threads for tests.
#ifndef PBJAX_POOL_H_
#define PBJAX_POOL_H_

#include <stdint.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "parallel.h"

namespace pbjax {

// As XLA's: its threads sleep until there is work. One less than it has, as its caller works too.
class Pool : public Scheduler {
 public:
  explicit Pool(int64_t num_threads) {
    for (int64_t i = 1; i < num_threads; ++i) {
      threads_.emplace_back([this] { Work(); });
    }
  }
  ~Pool() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  int64_t num_threads() const override { return static_cast<int64_t>(threads_.size()) + 1; }
  void Schedule(std::function<void()> task) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    wake_.notify_one();
  }

 private:
  void Work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
  bool stop_ = false;
};

}  // namespace pbjax

#endif  // PBJAX_POOL_H_
