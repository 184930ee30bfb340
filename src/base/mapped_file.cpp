#include "base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <mutex>
#include <string>
#include <utility>

#include "base/fail.h"
#include "base/files.h"

namespace fourfold {

/// A mapping as the signal handler sees it: an entry of a list that only grows, so that it may be walked at
/// any time. Entries of mappings that are gone are used again.
struct MappedFile::Registration {
  std::atomic<uintptr_t> begin{0}, end{0};  ///< equal: free
  std::atomic<bool> has_unreadable_page{false};
  int descriptor = -1;
  std::string path;
  Registration* next = nullptr;  ///< fixed once the entry is in the list
};

namespace {

std::mutex registry_mutex;                   // of all but what the handler reads
std::atomic<void*> registrations = nullptr;  // the list's head, a MappedFile::Registration
std::string* first_damage = nullptr;         // of mappings that are gone
struct sigaction previous_action = {};
const auto kPageSize = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));

bool is_shorter(int descriptor, size_t size) {
  struct stat status = {};
  return fstat(descriptor, &status) != 0 || status.st_size < static_cast<int64_t>(size);
}

/// What happened to a mapping, in words; empty where nothing did.
std::string damage_of(const std::string& path, int descriptor, size_t size, bool has_unreadable_page) {
  if (is_shorter(descriptor, size)) {
    return fmt::format(
        "{}: expected {} bytes while it is read, found that it was truncated; what was read is "
        "void: run again when nothing writes to it",
        path, size);
  }
  if (!has_unreadable_page) return {};
  return fmt::format("{}: can't read all of it: the system reported an I/O error; is the disk sound?", path);
}

}  // namespace

/// Advice on the whole pages that `bytes` touch, where they belong to a mapped file: what is advised here
/// would destroy other memory.
void advise_mapped(std::span<const std::byte> bytes, int advice) {
  const auto begin = reinterpret_cast<uintptr_t>(bytes.data()), end = begin + bytes.size();
  const std::lock_guard lock(registry_mutex);
  auto* entry = static_cast<MappedFile::Registration*>(registrations.load());
  while (entry != nullptr && !(entry->begin <= begin && end <= entry->end)) entry = entry->next;
  if (entry == nullptr || bytes.empty()) return;
  const uintptr_t first = begin / kPageSize * kPageSize;
  madvise(reinterpret_cast<void*>(first), end - first, advice);  // advice may fail
}

MappedFile::MappedFile(std::filesystem::path path) : path_(std::move(path)) {
  require_regular_file(path_);  // a pipe would block open()
  descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) fail_io(path_, "open");
  struct stat status = {};
  const bool known = fstat(descriptor_, &status) == 0;
  size_ = known ? static_cast<size_t>(status.st_size) : 0;
  void* mapped = known && size_ > 0 ? mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor_, 0) : nullptr;
  if (!known || mapped == MAP_FAILED) {
    const int error = errno;
    close(descriptor_);
    errno = error;
    fail_io(path_, "map");
  }
  data_ = static_cast<std::byte*>(mapped);
  if (size_ == 0) return;

  const std::lock_guard lock(registry_mutex);
  auto* entry = static_cast<Registration*>(registrations.load());
  while (entry != nullptr && entry->end != 0) entry = entry->next;
  if (entry == nullptr) {
    entry = new Registration;
    entry->next = static_cast<Registration*>(registrations.load());
    registrations.store(entry);
  }
  entry->descriptor = descriptor_;
  entry->path = path_.string();
  entry->has_unreadable_page = false;
  entry->begin = reinterpret_cast<uintptr_t>(data_);
  entry->end = reinterpret_cast<uintptr_t>(data_) + size_;
  registration_ = entry;
}

MappedFile::~MappedFile() {
  if (registration_ != nullptr) {
    const std::lock_guard lock(registry_mutex);
    std::string damage =
        damage_of(registration_->path, descriptor_, size_, registration_->has_unreadable_page);
    if (!damage.empty() && first_damage == nullptr) first_damage = new std::string(std::move(damage));
    registration_->end = 0;
    registration_->begin = 0;
  }
  if (data_ != nullptr) munmap(data_, size_);
  if (descriptor_ >= 0) close(descriptor_);
}

void MappedFile::read_at(std::span<std::byte> out, int64_t offset) const {
  while (!out.empty()) {
    const ssize_t count = pread(descriptor_, out.data(), out.size(), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail_io(path_, "read");
    if (count == 0) {
      fail(ErrorCode::kIo, "{}: expected {} more bytes at offset {}, found its end: was it truncated?",
           path_.string(), out.size(), offset);
    }
    out = out.subspan(static_cast<size_t>(count));
    offset += count;
  }
}

void MappedFile::drop_pages() const {
  if (size_ > 0) madvise(data_, size_, MADV_DONTNEED);  // refused, they stay: no harm
}

void MappedFile::require_intact() const {
  if (registration_ == nullptr) return;
  const std::string damage =
      damage_of(registration_->path, descriptor_, size_, registration_->has_unreadable_page);
  if (!damage.empty()) fail(ErrorCode::kIo, "{}", damage);
}

void guard_mapped_files() {
  struct sigaction action = {};
  action.sa_flags = SA_SIGINFO;
  // Calls what may be called at any time: loads, stores and one system call.
  action.sa_sigaction = [](int, siginfo_t* info, void*) {
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    auto* entry = static_cast<MappedFile::Registration*>(registrations.load());
    if (info->si_code <= 0) entry = nullptr;  // sent by a program: there is no address
    for (; entry != nullptr; entry = entry->next) {
      const uintptr_t page = address / kPageSize * kPageSize;
      // The file's last page belongs to it to its end.
      if (page + kPageSize <= entry->begin || page >= entry->end) continue;
      const int saved_errno = errno;
      void* zeros = mmap(reinterpret_cast<void*>(page), kPageSize, PROT_READ,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
      errno = saved_errno;
      if (zeros == MAP_FAILED) break;
      entry->has_unreadable_page = true;
      return;
    }
    sigaction(SIGBUS, &previous_action, nullptr);  // the same access faults again, for them
  };
  sigaction(SIGBUS, &action, &previous_action);
}

void prefetch_mapped(std::span<const std::byte> bytes) {
  advise_mapped(bytes, MADV_WILLNEED);
}

void release_mapped(std::span<const std::byte> bytes) {
  advise_mapped(bytes, MADV_DONTNEED);
}

void require_mapped_files_intact() {
  const std::lock_guard lock(registry_mutex);
  if (first_damage != nullptr) fail(ErrorCode::kIo, "{}", *first_damage);
  auto* entry = static_cast<MappedFile::Registration*>(registrations.load());
  for (; entry != nullptr; entry = entry->next) {
    if (entry->end == 0) continue;
    const std::string damage =
        damage_of(entry->path, entry->descriptor, entry->end - entry->begin, entry->has_unreadable_page);
    if (!damage.empty()) fail(ErrorCode::kIo, "{}", damage);
  }
}

}  // namespace fourfold
