// Mapped files that change under their reader.
#include "base/mapped_file.h"

#include <gtest/gtest.h>

#include <array>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "base/files.h"
#include "fourfold/error.h"
#include "refusals.h"
#include "temporary_folder.h"

namespace fourfold {
namespace {

constexpr size_t kPage = 4096;

/// A file of `pages` pages of ones that goes away with the test.
class MappedFileTest : public TestInFolder {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(TestInFolder::SetUp());
    path_ = folder_ / "file";
    write_file(path_, std::string(4 * kPage, '\1'));
  }

  static int sum(const MappedFile& file) {
    return std::accumulate(file.bytes().begin(), file.bytes().end(), 0,
                           [](int total, std::byte byte) { return total + static_cast<int>(byte); });
  }

  std::filesystem::path path_;
};

using MappedFileDeathTest = MappedFileTest;

TEST_F(MappedFileTest, ReadsAsItIs) {
  const MappedFile file(path_);
  EXPECT_EQ(sum(file), 4 * kPage);
  EXPECT_NO_THROW(file.require_intact());
  std::array<std::byte, 3> some{};
  file.read_at(some, 5);
  EXPECT_EQ(some[2], std::byte{1});
}

TEST_F(MappedFileTest, EmptyFileIsNoMapping) {
  write_file(path_, "");
  const MappedFile file(path_);
  EXPECT_TRUE(file.bytes().empty());
  EXPECT_NO_THROW(file.require_intact());
}

TEST_F(MappedFileTest, TruncationWithinThePageIsSeen) {
  // No signal comes for the rest of the last page: it reads as zeros.
  const MappedFile file(path_);
  std::filesystem::resize_file(path_, 4 * kPage - 10);
  EXPECT_EQ(sum(file), 4 * kPage - 10);
  EXPECT_NE(message_of([&] { file.require_intact(); }).find(path_.string()), std::string::npos);
}

TEST_F(MappedFileTest, ReadAtTellsTheEnd) {
  const MappedFile file(path_);
  std::filesystem::resize_file(path_, kPage);
  std::vector<std::byte> out(2 * kPage);
  EXPECT_NE(message_of([&] { file.read_at(out, 0); }).find("truncated"), std::string::npos);
}

TEST_F(MappedFileTest, AReplacedFileIsStillTheOldOne) {
  const MappedFile file(path_);
  write_file(path_, "new");
  EXPECT_EQ(sum(file), 4 * kPage);
  EXPECT_NO_THROW(file.require_intact());
}

// The handler is process-wide, so each case has a process of its own: exit code 0 where all went well.
TEST_F(MappedFileDeathTest, GuardedPagesReadAsZeros) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto run = [&] {
    guard_mapped_files();
    std::optional<MappedFile> file(path_);
    const MappedFile other(folder_ / "file");
    std::filesystem::resize_file(path_, kPage + 1);
    if (sum(*file) != kPage + 1) std::exit(10);
    if (message_of([&] { file->require_intact(); }).find("truncated") == std::string::npos) std::exit(11);
    file.reset();  // what is gone is remembered
    write_file(path_, "whole again");
    if (message_of(require_mapped_files_intact).find(path_.string()) == std::string::npos) std::exit(12);
    std::exit(0);
  };
  EXPECT_EXIT(run(), testing::ExitedWithCode(0), "");
}

TEST_F(MappedFileDeathTest, OtherFaultsStaySignals) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto run = [&] {
    std::signal(SIGBUS, [](int) { _exit(21); });
    guard_mapped_files();
    const MappedFile file(path_);
    std::raise(SIGBUS);  // at no address of ours: falls to the handler that was there, when raised again
    std::raise(SIGBUS);
  };
  EXPECT_EXIT(run(), testing::ExitedWithCode(21), "");
}

}  // namespace
}  // namespace fourfold
