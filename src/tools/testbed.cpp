#include "tools/testbed.h"

#include <algorithm>
#include <exception>
#include <thread>

#include "base/fail.h"
#if FOURFOLD_HAS_CUDA
#include "tools/cuda_testbed.h"
#endif

namespace fourfold {

std::unique_ptr<Testbed> make_testbed(const Backend& backend) {
  if (backend.memory().device().kind == Device::Kind::kHost) return make_cpu_testbed();
#if FOURFOLD_HAS_CUDA
  return make_cuda_testbed(backend.memory());
#else
  fail(ErrorCode::kUnsupported, "bench: backend '{}' computes on a GPU, and this build is without CUDA",
       backend.name());
#endif
}

void run_on_threads(size_t count, const std::function<void(size_t)>& work) {
  std::vector<std::exception_ptr> errors(count);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      try {
        work(i);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

void StageSums::add(std::string_view stage, double seconds) {
  auto sum = std::find_if(sums_.begin(), sums_.end(), [&](const StageTime& s) { return s.stage == stage; });
  if (sum == sums_.end()) sum = sums_.insert(sum, StageTime{std::string(stage), 0.0});
  sum->seconds += seconds;
}

std::vector<StageTime> StageSums::means(size_t calls) const {
  std::vector<StageTime> means = sums_;
  for (StageTime& mean : means) mean.seconds /= static_cast<double>(std::max<size_t>(calls, 1));
  return means;
}

}  // namespace fourfold
