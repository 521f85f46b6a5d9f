// The binding to XLA: operands checked, its thread pool passed on.
#include <exception>
#include <string>
#include <string_view>

#include "kernels.h"
#include "matmul.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace pbjax {
namespace {

namespace ffi = xla::ffi;

class XlaScheduler : public Scheduler {
 public:
  explicit XlaScheduler(ffi::ThreadPool pool) : pool_(pool), num_threads_(pool.num_threads()) {}
  int64_t num_threads() const override { return num_threads_; }
  void Schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool pool_;
  int64_t num_threads_;
};

ffi::Error BitMatmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U32, 3> words,
                     ffi::Buffer<ffi::F32, 3> scale, ffi::Buffer<ffi::S32, 1> counts, ffi::Result<ffi::AnyBuffer> y,
                     int64_t group_size, int64_t activation_bits, bool prefixes, std::string_view instructions) {
  const auto shape = words.dimensions();
  const auto x_shape = x.dimensions();
  if (x_shape.size() != 2) return ffi::Error::InvalidArgument("x must have rank 2");
  Problem problem = {};
  problem.m = x_shape[0];
  problem.k = x_shape[1];
  problem.n = shape[2];
  problem.bits = shape[0];
  problem.group_size = group_size;
  problem.activation_bits = static_cast<int>(activation_bits);
  problem.prefixes = prefixes;
  switch (x.element_type()) {
    case ffi::S32: problem.row_type = RowType::kCodes; break;
    case ffi::F32: problem.row_type = RowType::kFloat32; break;
    case ffi::BF16: problem.row_type = RowType::kBFloat16; break;
    case ffi::F16: problem.row_type = RowType::kFloat16; break;
    default: return ffi::Error::InvalidArgument("x must be int32, float32, bfloat16 or float16");
  }
  const auto scale_shape = scale.dimensions();
  const size_t size = problem.m * problem.n * (prefixes ? problem.bits : 1);
  if (problem.bits < 1 || problem.bits > kMaxBits || activation_bits < 0 || activation_bits > 8 * kMaxLimbs ||
      group_size < 0 || group_size % kWordBits != 0 || shape[1] != problem.num_words() ||
      scale_shape[0] != std::min<int64_t>(problem.bits, kNumScales) || scale_shape[1] != problem.groups() ||
      scale_shape[2] != problem.n || static_cast<int64_t>(counts.element_count()) != (prefixes ? 1 : problem.m) ||
      y->element_count() != size || y->element_type() != ffi::F32 ||
      (problem.row_type == RowType::kCodes && activation_bits == 0)) {
    return ffi::Error::InvalidArgument("operands do not fit each other");
  }
  const Kernels* kernels = FindKernels(instructions.data(), instructions.size());
  if (kernels == nullptr) return ffi::Error::InvalidArgument("no kernels named " + std::string(instructions));
  try {
    XlaScheduler scheduler(pool);
    Matmul(problem,
           {x.untyped_data(), words.typed_data(), scale.typed_data(), counts.typed_data(),
            static_cast<float*>(y->untyped_data())},
           *kernels, scheduler);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pbjax

namespace {

auto Binding() {
  return xla::ffi::Ffi::Bind()
      .Ctx<xla::ffi::ThreadPool>()
      .Arg<xla::ffi::AnyBuffer>()
      .Arg<xla::ffi::Buffer<xla::ffi::U32, 3>>()
      .Arg<xla::ffi::Buffer<xla::ffi::F32, 3>>()
      .Arg<xla::ffi::Buffer<xla::ffi::S32, 1>>()
      .Ret<xla::ffi::AnyBuffer>()
      .Attr<int64_t>("group_size")
      .Attr<int64_t>("activation_bits")
      .Attr<bool>("prefixes")
      .Attr<std::string_view>("instructions");
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(PbjaxBitMatmul, pbjax::BitMatmul, Binding());

// The version of XLA's interface that this library speaks: 1000 * major + minor.
extern "C" int PbjaxInterface() { return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }

// The names of the kernels that run on this machine, best first, separated by spaces.
extern "C" const char* PbjaxInstructions() {
  static const std::string names = [] {
    std::string result;
    const pbjax::Kernels* tables[pbjax::kMaxTables];
    const int count = pbjax::FindTables(tables);
    for (int i = 0; i < count; ++i) result += (i == 0 ? "" : " ") + std::string(tables[i]->name);
    return result;
  }();
  return names.c_str();
}
#pragma GCC visibility pop
