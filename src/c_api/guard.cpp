// What a failed call leaves behind, and structs whose size the caller says.
#include "c_api/guard.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace fourfold::c_api {
namespace {

constexpr const char* kOutOfMemory = "out of memory";

/// What fourfold_last_error returns; a text of its own where there is no memory for another.
thread_local std::string last_error_text;
thread_local bool ran_out_of_memory = false;

fourfold_status record(fourfold_status status, const char* text) noexcept {
  ran_out_of_memory = status == FOURFOLD_OUT_OF_MEMORY;
  if (ran_out_of_memory) return status;
  try {
    last_error_text = text;
  } catch (const std::bad_alloc&) {
    ran_out_of_memory = true;
  }
  return status;
}

fourfold_status status_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return FOURFOLD_INVALID_ARGUMENT;
    case ErrorCode::kBadFile:
      return FOURFOLD_BAD_FILE;
    case ErrorCode::kNotFound:
      return FOURFOLD_NOT_FOUND;
    case ErrorCode::kUnsupported:
      return FOURFOLD_UNSUPPORTED;
    case ErrorCode::kIo:
      return FOURFOLD_IO;
    case ErrorCode::kDevice:
      return FOURFOLD_DEVICE;
  }
  return FOURFOLD_INTERNAL;
}

/// No struct will ever be larger: a size beyond it was not set.
constexpr size_t kLargestStruct = 4096;

/// The first member of every struct.
size_t size_of(const void* given, const char* what) {
  size_t size = 0;
  std::memcpy(&size, given, sizeof size);
  if (size <= sizeof size || size > kLargestStruct) {
    reject(fmt::format("{}: size", what), fmt::format("sizeof({})", what), size);
  }
  return size;
}

}  // namespace

fourfold_status record_exception() noexcept {
  try {
    throw;
  } catch (const Error& error) {
    return record(status_of(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    return record(FOURFOLD_OUT_OF_MEMORY, kOutOfMemory);
  } catch (const std::exception& error) {
    return record(FOURFOLD_INTERNAL, error.what());
  } catch (...) {
    return record(FOURFOLD_INTERNAL, "an exception of an unknown type");
  }
}

void read_struct_bytes(void* known, size_t known_size, const void* given, const char* what) {
  const size_t size = size_of(given, what);
  const auto* bytes = static_cast<const unsigned char*>(given);
  if (size > known_size && std::any_of(bytes + known_size, bytes + size, [](auto byte) { return byte; })) {
    fail(ErrorCode::kUnsupported,
         "{}: expected zero in the members after byte {}, which fourfold {} does not know, found something "
         "else; load a newer library",
         what, known_size, fourfold_version());
  }
  std::memcpy(known, given, std::min(size, known_size));
}

void write_struct_bytes(const void* known, size_t known_size, void* out, const char* what) {
  const size_t size = size_of(out, what);
  auto* bytes = static_cast<unsigned char*>(out);
  const size_t both = std::min(size, known_size);
  std::memcpy(bytes + sizeof size, static_cast<const unsigned char*>(known) + sizeof size,
              both - sizeof size);
  std::memset(bytes + both, 0, size - both);
}

}  // namespace fourfold::c_api

const char* fourfold_last_error(void) {
  using namespace fourfold::c_api;
  return ran_out_of_memory ? kOutOfMemory : last_error_text.c_str();
}

const char* fourfold_status_text(fourfold_status status) {
  switch (status) {
    case FOURFOLD_OK:
      return "ok";
    case FOURFOLD_INVALID_ARGUMENT:
      return "invalid argument";
    case FOURFOLD_BAD_FILE:
      return "bad file";
    case FOURFOLD_NOT_FOUND:
      return "not found";
    case FOURFOLD_UNSUPPORTED:
      return "unsupported";
    case FOURFOLD_IO:
      return "input or output failed";
    case FOURFOLD_DEVICE:
      return "device failed";
    case FOURFOLD_OUT_OF_MEMORY:
      return "out of memory";
    case FOURFOLD_INTERNAL:
      return "internal error";
    default:
      return "unknown status";
  }
}

int32_t fourfold_abi_version(void) {
  return FOURFOLD_ABI_VERSION;
}

const char* fourfold_version(void) {
  return FOURFOLD_VERSION;
}
