// The one exception type of the library.
#pragma once

#include <stdexcept>
#include <string>

#include "fourfold/export.h"

namespace FOURFOLD_EXPORT fourfold {

enum class ErrorCode {
  kInvalidArgument,  ///< a shape, an option or a combination that the caller got wrong
  kBadFile,          ///< a file's content is damaged, hostile, or not what its names promise
  kNotFound,         ///< a file, a tensor or a layer that is not there
  kUnsupported,      ///< valid, but this build, backend or version does not implement it
  kIo,               ///< the system refused to read or write
  kDevice,           ///< a GPU or its driver refused or failed
};

/// What the library throws. The message names the thing, what was expected, what was found and the remedy.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace fourfold
