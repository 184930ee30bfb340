#include "checkpoint/strict_json.h"

#include <set>
#include <vector>

#include "base/fail.h"

namespace fourfold {
namespace {

constexpr size_t kMaxDepth = 64;          // real headers and configs stay below 10
constexpr size_t kMaxValues = 4'000'000;  // bounds memory; a header of 300,000 tensors has half of that

/// nlohmann's parser keeps the last of two equal keys and nests without a limit; this watches both.
class StructureGuard {
 public:
  explicit StructureGuard(const std::string& source) : source_(source) {}

  bool operator()(int /*depth*/, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if (++events_ > 2 * kMaxValues) {
      fail(ErrorCode::kBadFile, "{}: JSON: expected at most {} values, found more", source_, kMaxValues);
    }
    if (event == Event::object_start || event == Event::array_start) {
      if (keys_.size() >= kMaxDepth) {
        fail(ErrorCode::kBadFile, "{}: JSON: expected at most {} nested levels, found more", source_,
             kMaxDepth);
      }
      keys_.emplace_back();
    } else if (event == Event::object_end || event == Event::array_end) {
      keys_.pop_back();
    } else if (event == Event::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys_.back().insert(key).second) {
        fail(ErrorCode::kBadFile, "{}: JSON: expected each key once, found '{}' again", source_, key);
      }
    }
    return true;
  }

 private:
  const std::string& source_;
  std::vector<std::set<std::string>> keys_;
  size_t events_ = 0;
};

}  // namespace

nlohmann::json parse_strict_json(std::string_view text, const std::string& source) {
  try {
    return nlohmann::json::parse(text.begin(), text.end(), StructureGuard(source));
  } catch (const nlohmann::json::exception& error) {
    fail(ErrorCode::kBadFile, "{}: expected JSON, found: {}", source,
         std::string(error.what()).substr(0, 300));
  }
}

}  // namespace fourfold
