// A file mapped into memory, and what becomes of reads that the system can't satisfy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>

namespace fourfold {

/// Maps a whole regular file for reading. Throws Error naming the file when the system refuses.
///
/// Reading a mapped page of a file that was truncated meanwhile, or that its disk can't deliver, raises
/// SIGBUS. After guard_mapped_files() such a page reads as zeros, and require_mapped_files_intact() tells.
/// What stays unseen: a file that others overwrite in place. A device driver that copies from a mapping
/// itself (a GPU's) reports its own error.
class MappedFile {
 public:
  explicit MappedFile(std::filesystem::path path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  /// Copies bytes of the file by a system call: what can't be read is an Error, not a signal.
  void read_at(std::span<std::byte> out, int64_t offset) const;
  /// Gives the pages that were read back to the system; reading one again fetches it from the file again.
  void drop_pages() const;
  /// Throws Error naming the file where it shrank since it was mapped, or a page of it could not be read:
  /// whatever was computed from it is void.
  void require_intact() const;

 private:
  struct Registration;
  friend void guard_mapped_files();
  friend void advise_mapped(std::span<const std::byte> bytes, int advice);
  friend void require_mapped_files_intact();

  std::filesystem::path path_;
  int descriptor_ = -1;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  Registration* registration_ = nullptr;
};

/// Makes unreadable pages of mapped files read as zeros instead of ending the process, by a handler of SIGBUS
/// that leaves all other ones to whom they belonged before. For programs; a library leaves signals alone.
void guard_mapped_files();

/// Asks the system to read these bytes of a mapped file ahead of their use. No effect on other memory.
void prefetch_mapped(std::span<const std::byte> bytes);

/// Gives back the memory of these bytes of a mapped file, for those who stream through files larger than
/// memory; reading them again is right, and slow. No effect on other memory.
void release_mapped(std::span<const std::byte> bytes);

/// MappedFile::require_intact() for all that are or ever were mapped: for the end of a program's work, before
/// its result is told.
void require_mapped_files_intact();

}  // namespace fourfold
