#include "checkpoint/strict_json.h"

#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "base/fail.h"

namespace fourfold {
namespace {

constexpr size_t kMaxDepth = 64;          // real headers and configs stay below 10
constexpr size_t kMaxValues = 4'000'000;  // bounds memory; a header of 300,000 tensors has half of that
constexpr size_t kMaxReason = 300;        // characters of the parser's own message

/// nlohmann's parser keeps the last of two equal keys and nests without a limit; this pass over the text
/// watches both.
class StructureGuard : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit StructureGuard(const std::string& source) : source_(source) {}

  bool null() override { return count_value(); }
  bool boolean(bool) override { return count_value(); }
  bool number_integer(number_integer_t) override { return count_value(); }
  bool number_unsigned(number_unsigned_t) override { return count_value(); }
  bool number_float(number_float_t, const string_t&) override { return count_value(); }
  bool string(string_t&) override { return count_value(); }
  bool binary(binary_t&) override { return count_value(); }
  bool start_object(size_t) override { return enter(); }
  bool start_array(size_t) override { return enter(); }
  bool end_object() override { return leave(); }
  bool end_array() override { return leave(); }

  bool key(string_t& key) override {
    if (!keys_.back().insert(key).second) {
      fail(ErrorCode::kBadFile, "{}: JSON: expected each key once, found '{}' again", source_, key);
    }
    return true;
  }

  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& error) override {
    fail(ErrorCode::kBadFile, "{}: expected JSON, found: {}", source_,
         std::string(error.what()).substr(0, kMaxReason));
  }

 private:
  bool count_value() {
    if (++values_ > kMaxValues) {
      fail(ErrorCode::kBadFile, "{}: JSON: expected at most {} values, found more", source_, kMaxValues);
    }
    return true;
  }

  bool enter() {
    if (keys_.size() >= kMaxDepth) {
      fail(ErrorCode::kBadFile, "{}: JSON: expected at most {} nested levels, found more", source_,
           kMaxDepth);
    }
    keys_.emplace_back();
    return count_value();
  }

  bool leave() {
    keys_.pop_back();
    return true;
  }

  const std::string& source_;
  std::vector<std::set<std::string>> keys_;
  size_t values_ = 0;
};

}  // namespace

nlohmann::json parse_strict_json(std::string_view text, const std::string& source) {
  if (text.find('\0') != std::string_view::npos) {  // where the parser would take the text to end
    fail(ErrorCode::kBadFile, "{}: expected JSON, found a NUL character at offset {}", source,
         text.find('\0'));
  }
  StructureGuard guard(source);
  nlohmann::json::sax_parse(text.begin(), text.end(), &guard);
  return nlohmann::json::parse(text.begin(), text.end());
}

std::string string_in(const nlohmann::json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_string() ? it->get<std::string>() : "";
}

}  // namespace fourfold
