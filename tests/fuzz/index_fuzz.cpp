// Fuzzes model.safetensors.index.json in a directory with two sound shards, a link that leads out and one
// that leads nowhere.
#include <filesystem>
#include <string>

#include "fourfold/checkpoint.h"
#include "fuzz_target.h"
#include "json_mutator.h"

namespace fourfold {
namespace {

constexpr const char* kFirst = "model-00001-of-00002.safetensors";
constexpr const char* kSecond = "model-00002-of-00002.safetensors";

const std::filesystem::path& model_directory() {
  static const std::filesystem::path directory = [] {
    const auto& path = fuzz::scratch_directory();
    const std::byte zeros[8] = {};
    const auto shard = [&](const char* file, std::initializer_list<const char*> names) {
      std::vector<TensorData> tensors;
      for (const char* name : names) tensors.push_back({{name, DType::kF32, {2}}, zeros});
      write_safetensors(path / file, tensors);
    };
    shard(kFirst, {"a", "b"});
    shard(kSecond, {"c"});
    shard("unnamed.safetensors", {"d"});
    std::filesystem::create_directory(path / "folder");
    std::filesystem::create_symlink("/etc/passwd", path / "out.safetensors");
    std::filesystem::create_symlink("gone", path / "nowhere.safetensors");
    std::filesystem::create_symlink(kFirst, path / "link.safetensors");
    return path;
  }();
  return directory;
}

}  // namespace
}  // namespace fourfold

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fourfold;
  const std::filesystem::path& directory = model_directory();
  fuzz::write_in_place(directory / "model.safetensors.index.json",
                       {reinterpret_cast<const char*>(data), size});
  try {
    const auto checkpoint = Checkpoint::open(directory);
    for (const auto& [name, tensor] : checkpoint->tensors()) {
      fuzz::require(std::filesystem::path(tensor->file).parent_path() == directory,
                    "files are the directory's");
      fuzz::require(name >= "a" && name <= "d", "tensors are the shards'");
    }
  } catch (const Error&) {
  }
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  return fourfold::fuzz::mutate_json_input(data, size, max_size, seed);
}
