// What an action that has to be refused says.
#pragma once

#include <string>

#include "fourfold/error.h"

namespace fourfold {

/// The message of the Error that `action` throws; "no error" where it throws none.
std::string message_of(const auto& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace fourfold
