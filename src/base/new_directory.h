// A directory of many files that appears whole or not at all.
#pragma once

#include <filesystem>

namespace fourfold {

/// `target` in the making: a sibling, "<target>.partial", to fill with files. commit() brings them to the
/// disk and gives them the name `target`; without it nothing is left behind. What a run that was killed left
/// is removed by the next run for the same target, and never has the target's name.
class NewDirectory {
 public:
  /// Throws Error where `target` exists, can't be made, or is being made by another process; and where
  /// "<target>.partial" is something that this class did not make.
  explicit NewDirectory(const std::filesystem::path& target);
  ~NewDirectory();
  NewDirectory(const NewDirectory&) = delete;
  NewDirectory& operator=(const NewDirectory&) = delete;

  /// Where the files go.
  const std::filesystem::path& path() const { return partial_; }
  /// Throws Error where the system refuses, or `target` was made meanwhile.
  void commit();

 private:
  void acquire();
  void empty_it() const;

  std::filesystem::path target_, partial_;
  int lock_ = -1;  // of the marker, which nobody else may hold
};

}  // namespace fourfold
