// `layertest --self-test`: plants every known fault in an engine that shares no code with the replay, and
// shows whether the matcher names it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "diagnosis/subject.h"

namespace fourfold {

struct SelfTestRequest {
  /// A layer to plant faults in, instead of made-up layers of several families.
  const diagnosis::Subject* subject = nullptr;
  std::string subject_name;
  uint64_t seed = 0;
  /// On sound engines; a quarter as many on pairs. Below 200 faults are planted in fewer layers.
  int64_t sound_trials = 200;
  std::function<void(std::string_view)> progress = [](std::string_view) {};
};

/// Of one fault, over all data. A fault that is missed has trials added to it, up to 20.
struct FaultTally {
  int64_t trials = 0;  ///< where it changes the output
  int64_t named = 0;   ///< it came first
  int64_t in_class =
      0;  ///< another came first that does the same on the data at hand, and it was named as such
  int64_t left_out = 0;  ///< data on which it changes nothing beyond rounding

  bool is_named() const;  ///< in 95% of its trials, classes counted
};

struct SelfTestReport {
  std::vector<std::string> data;             ///< a line each
  std::map<std::string, FaultTally> faults;  ///< by id
  /// Planted and named first, off the diagonal; "none": nothing known explained it.
  std::map<std::pair<std::string, std::string>, int64_t> confusion;
  /// Faults that came together: what does the same on some data.
  std::map<std::pair<std::string, std::string>, int64_t> alike;
  int64_t sound_trials = 0, sound_claimed = 0, sound_unexplained = 0;
  std::vector<std::string> claimed;  ///< faults that were claimed on sound candidates
  int64_t pair_trials = 0, pairs_first = 0, pairs_top_two = 0,  // classes counted
      pairs_left_out = 0;
  double seconds = 0.0;

  int64_t trials() const;
  int64_t named() const;  ///< classes not counted
  int64_t in_class() const;
  int64_t left_out() const;
  /// Every fault is named in 95% of its trials and half of the pairs in the first two, classes counted; on
  /// sound candidates nothing is claimed, and none is called unexplained.
  bool passes() const;
};

SelfTestReport run_self_test(const SelfTestRequest& request);

std::string format_self_test(const SelfTestReport& report);
std::string self_test_json(const SelfTestReport& report);

}  // namespace fourfold
