// Model directories from plans: what they hold, and that they are there whole or not at all.
#include "checkpoint/model_writer.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "base/files.h"
#include "base/new_directory.h"
#include "fourfold/checkpoint.h"
#include "fourfold/error.h"
#include "refusals.h"
#include "temporary_folder.h"

namespace fourfold {
namespace {

class ModelWriterTest : public TestInFolder {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(TestInFolder::SetUp());
    bytes_.resize(96);
    std::iota(reinterpret_cast<uint8_t*>(bytes_.data()),
              reinterpret_cast<uint8_t*>(bytes_.data() + bytes_.size()), uint8_t{1});
  }

  /// Two carried tensors, one that two tasks write half each, a config and a copied file.
  ModelPlan plan() {
    write_file(folder_ / "tokens", "abc");
    ModelPlan plan;
    plan.tensors = {{{"a", DType::kU8, {32}}, bytes_.data()},
                    {{"b", DType::kU8, {2, 8}}, nullptr},
                    {{"c", DType::kF32, {2}}, bytes_.data() + 32}};
    for (const int64_t half : {0, 1}) {
      plan.tasks.push_back({"b", {std::span(bytes_).subspan(40, 8)}, 8, [this, half](const WritePart& write) {
                              write("b", half * 8, std::span(bytes_).subspan(40, 8));
                            }});
    }
    plan.files = {{"config.json", "", "{}"}, {"deep/tokens", folder_ / "tokens", ""}};
    return plan;
  }

  static std::string content(const Checkpoint& model, const char* name) {
    const Tensor* tensor = model.find(name);
    return {reinterpret_cast<const char*>(tensor->data), static_cast<size_t>(tensor->bytes)};
  }
  std::string bytes(size_t first, size_t count) const {
    return {reinterpret_cast<const char*>(bytes_.data()) + first, count};
  }

  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
      found.push_back(entry.path().filename().string());
    }
    std::sort(found.begin(), found.end());
    return found;
  }

  std::vector<std::byte> bytes_;
};

TEST_F(ModelWriterTest, WritesWhatIsCarriedProducedAndCopied) {
  int64_t last = 0, total = 0;
  write_model(folder_ / "m", plan(), [&](int64_t done, int64_t all) {
    EXPECT_GE(done, last);
    last = done;
    total = all;
  });
  EXPECT_EQ(last, total);
  EXPECT_EQ(total, 32 + 8 + 2 * 8);
  const auto model = Checkpoint::open(folder_ / "m");
  EXPECT_EQ(content(*model, "a"), bytes(0, 32));
  EXPECT_EQ(content(*model, "b"), bytes(40, 8) + bytes(40, 8));
  EXPECT_EQ(content(*model, "c"), bytes(32, 8));
  EXPECT_EQ(read_file(folder_ / "m/deep/tokens", 100), "abc");
  EXPECT_EQ(read_file(folder_ / "m/config.json", 100), "{}");
  EXPECT_FALSE(std::filesystem::exists(folder_ / "m/model.safetensors.index.json"));
  EXPECT_EQ(names(), (std::vector<std::string>{"m", "tokens"}));
}

TEST_F(ModelWriterTest, AlignsTensorsToTheirElementsAndSaysWhatTheyAreFor) {
  write_model(folder_ / "m", plan());
  const auto file = SafetensorsFile::open(folder_ / "m/model.safetensors");
  const auto* start = std::min({file->at("a").data, file->at("b").data, file->at("c").data});
  EXPECT_EQ(file->at("c").data, start);  // float32 before bytes
  EXPECT_NE(read_file(folder_ / "m/model.safetensors", 10000).find(R"("__metadata__":{"format":"pt"})"),
            std::string::npos);
}

TEST_F(ModelWriterTest, SplitsIntoShardsInOrderWithAnIndex) {
  ModelPlan small = plan();
  small.shard_bytes = 32;  // 56 bytes: two shards
  write_model(folder_ / "m", small);
  const auto model = Checkpoint::open(folder_ / "m");
  EXPECT_TRUE(model->find("a")->file.ends_with("model-00001-of-00002.safetensors"));
  EXPECT_TRUE(model->find("c")->file.ends_with("model-00002-of-00002.safetensors"));
  EXPECT_EQ(content(*model, "b"), bytes(40, 8) + bytes(40, 8));
  EXPECT_NE(read_file(folder_ / "m/model.safetensors.index.json", 10000).find("\"total_size\": 56"),
            std::string::npos);
}

TEST_F(ModelWriterTest, LeavesNoShardEmptyBehindATensorLargerThanOne) {
  ModelPlan small = plan();
  small.shard_bytes = 8;  // 56 bytes: seven places for three tensors
  write_model(folder_ / "m", small);
  const auto model = Checkpoint::open(folder_ / "m");
  for (const auto& [name, file] : {std::pair("a", "1"), std::pair("b", "2"), std::pair("c", "3")}) {
    EXPECT_TRUE(
        model->find(name)->file.ends_with(std::string("model-0000") + file + "-of-00003.safetensors"));
  }
  const auto entries = std::filesystem::directory_iterator(folder_ / "m");
  EXPECT_EQ(std::count_if(begin(entries), end(entries),
                          [](const auto& entry) { return entry.path().extension() == ".safetensors"; }),
            3);
}

TEST_F(ModelWriterTest, LeavesNothingWhereATaskFails) {
  ModelPlan broken = plan();
  broken.tasks[1].run = [](const WritePart&) { throw Error(ErrorCode::kBadFile, "a bad block"); };
  EXPECT_EQ(message_of([&] { write_model(folder_ / "m", broken); }), "a bad block");
  EXPECT_EQ(names(), std::vector<std::string>{"tokens"});
}

TEST_F(ModelWriterTest, LeavesNothingWhereATensorWasNotWritten) {
  ModelPlan partial = plan();
  partial.tasks.pop_back();
  EXPECT_NE(message_of([&] { write_model(folder_ / "m", partial); }).find("tensor 'b' was declared and not"),
            std::string::npos);
  EXPECT_EQ(names(), std::vector<std::string>{"tokens"});
}

TEST_F(ModelWriterTest, RefusesPartsThatDoNotFit) {
  ModelPlan long_part = plan();
  long_part.tasks[0].run = [this](const WritePart& write) { write("b", 9, std::span(bytes_).first(8)); };
  EXPECT_NE(message_of([&] { write_model(folder_ / "m", long_part); }).find("expected a part of 16 bytes"),
            std::string::npos);
}

TEST_F(ModelWriterTest, NeverReplacesWhatIsThere) {
  std::filesystem::create_directory(folder_ / "m");
  EXPECT_NE(message_of([&] { write_model(folder_ / "m", plan()); }).find("expected nothing of that name"),
            std::string::npos);
  EXPECT_EQ(names(), (std::vector<std::string>{"m", "tokens"}));
}

TEST_F(ModelWriterTest, TakesOverWhatAKilledRunLeft) {
  std::filesystem::create_directory(folder_ / "m.partial");
  write_file(folder_ / "m.partial/.fourfold-partial", "");
  write_file(folder_ / "m.partial/leftover", "x");
  write_model(folder_ / "m", plan());
  EXPECT_FALSE(std::filesystem::exists(folder_ / "m/leftover"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "m/.fourfold-partial"));
  EXPECT_EQ(names(), (std::vector<std::string>{"m", "tokens"}));
}

TEST_F(ModelWriterTest, LeavesOtherPeoplesFilesAlone) {
  std::filesystem::create_directory(folder_ / "m.partial");
  write_file(folder_ / "m.partial/thesis", "x");
  EXPECT_NE(message_of([&] { write_model(folder_ / "m", plan()); }).find("found something else"),
            std::string::npos);
  EXPECT_EQ(read_file(folder_ / "m.partial/thesis", 10), "x");
}

TEST_F(ModelWriterTest, LetsOneWriterAtATime) {
  NewDirectory first(folder_ / "m");
  EXPECT_NE(message_of([&] { NewDirectory second(folder_ / "m/"); }).find("another process is making it"),
            std::string::npos);
  first.commit();
  EXPECT_EQ(names(), std::vector<std::string>{"m"});
}

TEST_F(ModelWriterTest, ReleasesNothingButMappedFiles) {
  write_model(folder_ / "m", plan());  // whose tasks read memory of this test
  EXPECT_EQ(bytes(0, 2), "\1\2");
}

}  // namespace
}  // namespace fourfold
