#include "base/new_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <string>
#include <system_error>

#include "base/fail.h"

namespace fourfold {
namespace {

/// Says whose a directory is, and is locked while it is being filled.
constexpr const char* kMarker = ".fourfold-partial";

/// Of a file or a directory: what is in it survives a power cut.
void bring_to_disk(const std::filesystem::path& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail_io(path, "open");
  const bool done = fsync(descriptor) == 0;
  const int error = errno;
  close(descriptor);
  errno = error;
  if (!done && error != EINVAL) fail_io(path, "write");  // EINVAL: a file system that can't
}

/// "a/b/" and "a/b" are the same; "." has no sibling of a usable name.
std::filesystem::path without_slash(const std::filesystem::path& path) {
  const std::filesystem::path normal = path.lexically_normal();
  return normal.has_filename() ? normal : normal.parent_path();
}

bool is_there(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::exists(std::filesystem::symlink_status(path, ignored));
}

}  // namespace

NewDirectory::NewDirectory(const std::filesystem::path& target) : target_(without_slash(target)) {
  const std::string name = target_.filename().string();
  if (name.empty() || name == "." || name == "..") {
    fail(ErrorCode::kInvalidArgument, "{}: expected the name of a directory to make, found none",
         target.string());
  }
  if (is_there(target_)) {
    fail(ErrorCode::kInvalidArgument, "{}: expected nothing of that name, found something; it is left alone",
         target_.string());
  }
  partial_ = target_.parent_path() / (name + ".partial");
  acquire();
  try {
    empty_it();
  } catch (...) {
    close(lock_);
    throw;
  }
}

/// Makes the directory, or takes over one that a killed run left; and locks it.
void NewDirectory::acquire() {
  const bool is_new = mkdir(partial_.c_str(), 0755) == 0;
  if (!is_new && errno != EEXIST) fail_io(partial_, "create");
  const std::filesystem::path marker = partial_ / kMarker;
  std::error_code ignored;
  if (!is_new && !is_there(marker) && !std::filesystem::is_empty(partial_, ignored)) {
    fail(ErrorCode::kInvalidArgument,
         "{}: expected nothing, or what an earlier run left, found something else; move it away",
         partial_.string());
  }
  lock_ = open(marker.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
  if (lock_ < 0) fail_io(partial_, "create");
  if (flock(lock_, LOCK_EX | LOCK_NB) == 0) return;
  const int error = errno;
  close(lock_);
  errno = error;
  if (error != EWOULDBLOCK) fail_io(partial_, "lock");
  fail(ErrorCode::kInvalidArgument, "{}: another process is making it; wait for that, or end it",
       target_.string());
}

void NewDirectory::empty_it() const {
  for (const auto& entry : std::filesystem::directory_iterator(partial_)) {
    if (entry.path().filename() != kMarker) std::filesystem::remove_all(entry.path());
  }
}

NewDirectory::~NewDirectory() {
  if (lock_ < 0) return;
  std::error_code ignored;
  std::filesystem::remove_all(partial_, ignored);
  close(lock_);
}

void NewDirectory::commit() {
  std::error_code error;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(partial_)) {
    if (!entry.is_symlink()) bring_to_disk(entry.path());
  }
  bring_to_disk(partial_);
  // An existing directory, even an empty one, is not replaced.
  if (renameat2(AT_FDCWD, partial_.c_str(), AT_FDCWD, target_.c_str(), RENAME_NOREPLACE) != 0) {
    if (errno != EINVAL && errno != ENOSYS) fail_io(target_, "write");
    std::filesystem::rename(partial_, target_, error);  // a file system without that flag
    if (error) fail(ErrorCode::kIo, "{}: can't write it: {}", target_.string(), error.message());
  }
  close(lock_);
  lock_ = -1;
  // Last: without its marker, what a kill leaves would be nobody's.
  std::filesystem::remove(target_ / kMarker, error);
  bring_to_disk(target_);
  const std::filesystem::path parent = target_.parent_path();
  bring_to_disk(parent.empty() ? "." : parent);
}

}  // namespace fourfold
