#include "tools/cpu_ceilings.h"

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>

#include "base/fail.h"
#include "tools/cpu_peaks.h"

namespace fourfold {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// A ceiling is what was reached at best: whatever disturbs a measurement lowers it, and a ceiling that is
/// too low flatters what is compared with it.
double best(const std::vector<double>& rates) {
  return *std::max_element(rates.begin(), rates.end());
}

/// Anonymous memory in large pages where the system gives them; less than asked for where it gives no more.
class HugeMapping {
 public:
  explicit HugeMapping(size_t bytes) : bytes_(bytes) {
    constexpr size_t kLeastBytes = size_t{16} << 20;
    void* data = MAP_FAILED;
    for (bytes_ *= 2; data == MAP_FAILED && bytes_ / 2 >= kLeastBytes;) {
      bytes_ /= 2;
      data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    if (data == MAP_FAILED) fail(ErrorCode::kIo, "can't map {} bytes to measure the memory's speed", bytes_);
    madvise(data, bytes_, MADV_HUGEPAGE);
    words_ = static_cast<uint64_t*>(data);
  }
  ~HugeMapping() { munmap(words_, bytes_); }
  HugeMapping(const HugeMapping&) = delete;
  HugeMapping& operator=(const HugeMapping&) = delete;

  uint64_t* words() const { return words_; }
  size_t bytes() const { return bytes_; }
  size_t count() const { return bytes_ / sizeof(uint64_t); }

 private:
  uint64_t* words_ = nullptr;
  size_t bytes_ = 0;
};

/// The calling thread's part of `count` words, whole cache lines.
std::pair<size_t, size_t> part_of_thread(size_t count) {
  const auto threads = static_cast<size_t>(omp_get_num_threads());
  const size_t share = count / threads / 32 * 32, thread = static_cast<size_t>(omp_get_thread_num());
  return {thread * share, (thread + 1) * share};
}

volatile uint64_t g_sink;  // keeps what is read from being optimised away

/// Seconds of one pass of all threads over `mapping`, and the bytes that it read.
double time_read(const HugeMapping& mapping, size_t& bytes_read) {
  uint64_t sum = 0;
  size_t words = 0;
  const auto start = Clock::now();
#pragma omp parallel reduction(^ : sum) reduction(+ : words)
  {
    const auto [first, last] = part_of_thread(mapping.count());
    sum = xor_words(mapping.words() + first, last - first);
    words = last - first;
  }
  const double seconds = seconds_since(start);
  g_sink = sum;
  bytes_read = words * sizeof(uint64_t);
  return seconds;
}

/// Operations a second of one run by all threads.
double time_peak(const CpuPeak& peak, int64_t iterations) {
  const auto start = Clock::now();
#pragma omp parallel
  peak.run(iterations);
  const double operations = static_cast<double>(iterations) * peak.operations_an_iteration;
  return operations * omp_get_max_threads() / seconds_since(start);
}

/// "32K", "2M" -> bytes.
int64_t parse_cache_size(const std::string& text) {
  size_t end = 0;
  const int64_t number = std::stoll(text, &end);
  const char unit = end < text.size() ? text[end] : ' ';
  return number * (unit == 'K' ? 1 << 10 : unit == 'M' ? 1 << 20 : unit == 'G' ? 1 << 30 : 1);
}

}  // namespace

int64_t last_level_cache_bytes() {
  int64_t largest = 0;
  std::error_code error;
  const std::filesystem::path folder = "/sys/devices/system/cpu/cpu0/cache";
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    std::string size;
    std::ifstream(entry.path() / "size") >> size;
    if (!size.empty() && size[0] >= '0' && size[0] <= '9')
      largest = std::max(largest, parse_cache_size(size));
  }
  return largest > 0 ? largest : 32 << 20;
}

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown CPU";
}

Ceiling measure_dram_read(int64_t bytes, double min_seconds) {
  const int passes = min_seconds < kCeilingRunSeconds ? 2 : 7;
  const HugeMapping mapping(static_cast<size_t>(bytes));
#pragma omp parallel
  {
    const auto [first, last] = part_of_thread(mapping.count());
    std::fill(mapping.words() + first, mapping.words() + last, uint64_t{first});  // first touch
  }
  std::vector<double> rates;
  for (int pass = 0; pass < passes; ++pass) {
    size_t bytes_read = 0;
    const double seconds = time_read(mapping, bytes_read);
    rates.push_back(static_cast<double>(bytes_read) / seconds);
  }
  const bool in_cache = static_cast<int64_t>(mapping.bytes()) <= last_level_cache_bytes();
  return {"DRAM read", best(rates),
          fmt::format("{:.1f} GB, sequential, huge pages{}", 1e-9 * static_cast<double>(mapping.bytes()),
                      in_cache ? "; no more than the cache: there was no memory for more" : "")};
}

std::vector<Ceiling> measure_cpu_peaks(double min_seconds) {
  const double enough_seconds = std::min(kCeilingRunSeconds, min_seconds);
  constexpr int kRuns = 11;
  std::vector<Ceiling> ceilings;
  for (const CpuPeak& peak : cpu_peaks()) {
    if (!peak.why_not.empty()) {
      ceilings.push_back({peak.name, std::nullopt, peak.why_not});
      continue;
    }
    // How many iterations take long enough is found on one thread: waking others is no work.
    int64_t iterations = 1 << 14;
    for (auto start = Clock::now(); peak.run(iterations), seconds_since(start) < enough_seconds;) {
      iterations *= 2;
      start = Clock::now();
    }
    std::vector<double> rates;
    for (int run = 0; run < kRuns; ++run) rates.push_back(time_peak(peak, iterations));
    ceilings.push_back({peak.name, best(rates), ""});
  }
  return ceilings;
}

std::optional<double> measure_cpu_peak_behind(const Ceiling& peak, const std::function<void()>& work) {
  constexpr size_t kRuns = 5;
  constexpr double kEnoughSeconds = 1.0;
  const std::vector<CpuPeak> peaks = cpu_peaks();
  const auto known = std::find_if(peaks.begin(), peaks.end(), [&](const CpuPeak& candidate) {
    return candidate.name == peak.name && candidate.why_not.empty();
  });
  if (known == peaks.end() || !peak.per_second) return std::nullopt;
  const double an_iteration = known->operations_an_iteration * omp_get_max_threads() / *peak.per_second;
  const auto iterations = static_cast<int64_t>(kCeilingRunSeconds / 10 / an_iteration) + 1;
  std::vector<double> rates;
  for (const auto start = Clock::now();
       rates.empty() || (rates.size() < kRuns && seconds_since(start) < kEnoughSeconds);) {
    work();
    rates.push_back(time_peak(*known, iterations));
  }
  return best(rates);
}

}  // namespace fourfold
