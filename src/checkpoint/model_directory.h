// The files of a model directory.
#pragma once

#include <filesystem>
#include <string>

namespace fourfold {

inline constexpr const char* kIndexName = "model.safetensors.index.json";
inline constexpr const char* kSingleName = "model.safetensors";

/// Refuses a file of `directory` that is a symbolic link out of it: whoever wrote a downloaded folder decides
/// what is opened otherwise. The cache of Hugging Face, snapshots/REVISION/ beside blobs/, is made of such
/// links. `where`: what names the file, for messages.
void require_no_way_out(const std::filesystem::path& directory, const std::string& file,
                        const std::string& where);

/// Refuses a directory to be made, `target`, that is `source` or lies in it. `name`: what the command line
/// calls the source.
void require_apart(const std::filesystem::path& source, const std::filesystem::path& target,
                   const std::string& name);

}  // namespace fourfold
