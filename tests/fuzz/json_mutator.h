// Mutations of JSON that keep it JSON: most random changes of bytes end in the parser, and these do not.
#pragma once

#include <nlohmann/json.hpp>

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <string_view>

namespace fourfold::fuzz {

/// One or a few changes of values, keys and structure. Text that is no JSON comes back as it is.
std::string mutate_json(std::string_view text, std::minstd_rand& random);

/// Changes `value` in one place. For callers with more structure to keep.
void mutate_value(nlohmann::ordered_json& value, std::minstd_rand& random);

/// LLVMFuzzerCustomMutator of targets that take one JSON text: its structure mostly, bytes sometimes.
size_t mutate_json_input(uint8_t* data, size_t size, size_t max_size, unsigned int seed);

}  // namespace fourfold::fuzz
