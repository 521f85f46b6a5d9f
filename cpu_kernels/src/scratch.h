// Memory that a thread keeps from call to call.
#ifndef PBJAX_SCRATCH_H_
#define PBJAX_SCRATCH_H_

#include <stddef.h>
#include <stdint.h>

#include <cstdlib>
#include <new>

namespace pbjax {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // Ends the use of everything that was taken.
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

}  // namespace pbjax

#endif  // PBJAX_SCRATCH_H_
