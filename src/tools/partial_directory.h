// Output of several files that appears whole or not at all.
#pragma once

#include <filesystem>
#include <string>

namespace fourfold {

/// A directory for files in the making, beside their destination; removed with what is left in it. Leftovers
/// of runs that were killed are removed, too.
class PartialDirectory {
 public:
  /// Throws Error when it can't be created.
  explicit PartialDirectory(const std::filesystem::path& parent);
  ~PartialDirectory();
  PartialDirectory(const PartialDirectory&) = delete;
  PartialDirectory& operator=(const PartialDirectory&) = delete;

  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

  /// What stands there goes aside first, and goes with this directory.
  void move_into_place(const std::string& name, const std::filesystem::path& parent) const;

 private:
  std::filesystem::path path_;
};

}  // namespace fourfold
