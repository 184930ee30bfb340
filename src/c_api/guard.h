// Between C++ and C: exceptions become a status and a text, and structs of any version become this one's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/fail.h"
#include "fourfold/fourfold.h"

namespace fourfold::c_api {

/// The status of the exception that is being handled; its text goes to fourfold_last_error.
fourfold_status record_exception() noexcept;

/// Runs `body`, out of which nothing is thrown.
template <class Body>
fourfold_status guarded(const Body& body) noexcept {
  try {
    body();
    return FOURFOLD_OK;
  } catch (...) {
    return record_exception();
  }
}

/// Throws Error where `pointer` is null. `what` names the argument.
template <class T>
T& required(T* pointer, const char* what) {
  if (pointer == nullptr) reject(what, "a pointer", "null");
  return *pointer;
}

/// The same for an array, which may be null where it has no elements.
template <class T>
void require_array(const T* array, int64_t elements, const char* what) {
  if (array == nullptr && elements > 0) reject(what, fmt::format("{} elements", elements), "null");
}

/// An option that is a text; null is the default, "".
inline std::string text_or_empty(const char* text) {
  return text == nullptr ? std::string() : std::string(text);
}

/// Throws Error for a text that `parse` does not know, naming those it does.
template <class Parse>
auto parse_option(const char* text, Parse parse, const char* what, const char* choices) {
  using Parsed = decltype(parse(std::string_view()));
  const std::string name = text_or_empty(text);
  if (name.empty()) return Parsed();
  Parsed parsed = parse(name);
  if (!parsed) reject(what, choices, fmt::format("'{}'", name));
  return parsed;
}

/// Copies the struct at `given`, whose first member says how large its caller knows it to be, over the first
/// bytes of `known`. Throws Error for sizes that no version has, and for members that are not known and not
/// zero.
void read_struct_bytes(void* known, size_t known_size, const void* given, const char* what);
/// The reverse: `out` says how much of it there is; what its caller knows beyond `known` becomes zero.
void write_struct_bytes(const void* known, size_t known_size, void* out, const char* what);

/// The caller's struct as this library knows it; null is one of zeros.
template <class T>
T read_struct(const T* given, const char* what) {
  T known = {};
  if (given != nullptr) read_struct_bytes(&known, sizeof(T), given, what);
  return known;
}

/// `value` into the caller's struct; all but its size.
template <class T>
void write_struct(const T& value, T* out, const char* what) {
  write_struct_bytes(&value, sizeof(T), &required(out, what), what);
}

}  // namespace fourfold::c_api
