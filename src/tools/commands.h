// The subcommands of `fourfold`. Each adds itself to the command line and stores its exit code when it ran.
#pragma once

#include <CLI/CLI.hpp>

#include <charconv>
#include <cstdint>
#include <span>
#include <string>

#include "fourfold/moe_layer.h"
#include "tools/exit_codes.h"

namespace fourfold {

/// A whole number from 0 in decimal that fits T. CLI11 alone reads 010 as octal, lets -1 wrap around and lets
/// 2^64 saturate.
template <class T>
CLI::Validator whole_number() {
  return CLI::Validator(
      [](std::string& text) {
        T value{};
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        const bool plain = error == std::errc() && end == text.data() + text.size() && text[0] != '-' &&
                           (text[0] != '0' || text.size() == 1);
        return plain ? "" : "expected a whole number from 0, found '" + text + "'";
      },
      "");
}

/// "" is what an unset shell variable gives: it must not count as an option that was left out.
inline CLI::Validator nonempty(const std::string& what = "a path") {
  return CLI::Validator(
      [what](std::string& text) { return text.empty() ? "expected " + what + ", found nothing" : ""; }, "");
}

/// "A,B,C" into `fields`, one each; false unless `text` is exactly that many numbers.
inline bool parse_numbers(const std::string& text, std::span<int64_t* const> fields) {
  const char* at = text.data();
  const char* const end = at + text.size();
  for (int64_t* const field : fields) {
    const auto [next, error] = std::from_chars(at, end, *field);
    const bool is_last = field == fields.back();
    if (error != std::errc() || (is_last ? next != end : next == end || *next != ',')) return false;
    at = next + !is_last;
  }
  return true;
}

/// What --activation-scale says: "P" for x and the intermediate alike, or "P,P" for one each.
inline DefaultPolicies parse_scale_policies(const std::string& text) {
  const auto parse = [](const std::string& name) {
    if (const auto policy = parse_scale_policy(name)) return *policy;
    throw CLI::ValidationError(
        "--activation-scale",
        "expected static, max-over-experts, dynamic-tensor or dynamic-token, found '" + name + "'");
  };
  const size_t comma = text.find(',');
  const ScalePolicy x = parse(text.substr(0, comma));
  return {x, comma == std::string::npos ? x : parse(text.substr(comma + 1))};
}

/// --activation-rule into `rule`, which holds the default.
void add_activation_rule(CLI::App& command, std::string& rule);
/// What it says. Throws CLI::ValidationError where one of `formats` has no use for it.
ScaleRule activation_rule_in(const std::string& text, std::span<const ActivationFormat> formats);

/// --isa, beside --backend: the instruction set of the backend "cpu" (fourfold/cpu.h).
void add_isa_option(CLI::App& command);

void add_synthesize(CLI::App& app, int& exit_code);
void add_layertest(CLI::App& app, int& exit_code);
void add_gemmtest(CLI::App& app, int& exit_code);
void add_bench(CLI::App& app, int& exit_code);
void add_calibrate(CLI::App& app, int& exit_code);
void add_convert(CLI::App& app, int& exit_code);
void add_inspect(CLI::App& app, int& exit_code);
void add_doctor(CLI::App& app, int& exit_code);

}  // namespace fourfold
