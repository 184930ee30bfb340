// Opening a model directory: index, shards, config.
#include "fourfold/checkpoint.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <utility>

#include "base/fail.h"
#include "base/files.h"
#include "checkpoint/model_directory.h"
#include "checkpoint/quantization_claim.h"
#include "checkpoint/strict_json.h"

namespace fourfold {
namespace {

constexpr int64_t kMaxJsonBytes = 100'000'000;
constexpr size_t kMaxNameBytes = 255;  // of a file, on every file system that matters

/// Whether something of that name is there, be it a link to nowhere: what can't be looked at is an error, not
/// absence.
bool file_exists(const std::filesystem::path& path) {
  std::error_code error;
  const auto type = std::filesystem::symlink_status(path, error).type();
  if (type == std::filesystem::file_type::not_found) return false;
  if (error) fail(ErrorCode::kIo, "{}: can't look for it: {}", path.string(), error.message());
  return true;
}

/// "; its folders A, B have one", where folders right in `directory` are models: what was meant, perhaps. Of
/// many the first few.
std::string models_among_folders_of(const std::filesystem::path& directory) {
  constexpr size_t kMost = 3;
  std::set<std::string> models;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(directory, error), end; !error && entry != end;
       entry.increment(error)) {
    std::error_code ignored;
    if (std::filesystem::exists(entry->path() / kIndexName, ignored) ||
        std::filesystem::exists(entry->path() / kSingleName, ignored)) {
      models.insert(entry->path().filename().string());
      if (models.size() > kMost) models.erase(std::prev(models.end()));
    }
  }
  if (models.empty()) return "";
  return fmt::format("; its folder{} {} {} one", models.size() > 1 ? "s" : "", fmt::join(models, ", "),
                     models.size() > 1 ? "have" : "has");
}

bool lies_in(const std::filesystem::path& file, const std::filesystem::path& folder) {
  const auto [rest, end] = std::mismatch(folder.begin(), folder.end(), file.begin(), file.end());
  return rest == folder.end();
}

nlohmann::json read_json_object(const std::filesystem::path& path) {
  nlohmann::json json = parse_strict_json(read_file(path, kMaxJsonBytes), path.string());
  if (!json.is_object()) {
    fail(ErrorCode::kBadFile, "{}: expected a JSON object, found {}", path.string(), json.type_name());
  }
  return json;
}

/// First of `keys` that is a whole number; other types are an error, absence is not.
std::optional<int64_t> count_in(const nlohmann::json& config, const std::string& file,
                                std::initializer_list<const char*> keys) {
  for (const char* key : keys) {
    const auto it = config.find(key);
    if (it == config.end() || it->is_null()) continue;
    if (!it->is_number_unsigned() || it->get<uint64_t>() > INT32_MAX) {
      fail(ErrorCode::kBadFile, "{}: {}: expected a whole number below 2^31, found {}", file, key,
           it->dump().substr(0, 80));
    }
    return it->get<int64_t>();
  }
  return std::nullopt;
}

/// `key` as a positive float32; other values are an error, absence is not.
std::optional<float> positive_in(const nlohmann::json& config, const std::string& file, const char* key) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return std::nullopt;
  if (!it->is_number() || !(it->get<float>() > 0.0f) || !std::isfinite(it->get<float>())) {
    fail(ErrorCode::kBadFile, "{}: {}: expected a positive float32, found {}", file, key,
         it->dump().substr(0, 80));
  }
  return it->get<float>();
}

}  // namespace

void require_no_way_out(const std::filesystem::path& directory, const std::string& file,
                        const std::string& where) {
  std::error_code error;
  if (!std::filesystem::is_symlink(directory / file, error)) return;
  const auto target = std::filesystem::canonical(directory / file, error);
  if (error) return;  // a link to nothing, or to itself: what opens it says so
  const auto folder = std::filesystem::canonical(directory, error);
  if (!error && lies_in(target, folder)) return;
  const bool is_snapshot = folder.parent_path().filename() == "snapshots";
  if (is_snapshot && lies_in(target, folder.parent_path().parent_path() / "blobs")) return;
  fail(
      ErrorCode::kBadFile,
      "{}: shard '{}': expected a file in this directory, found a symbolic link to {}; copy it here, or open "
      "the directory that it is in",
      where, file, target.string());
}

void require_apart(const std::filesystem::path& source, const std::filesystem::path& target,
                   const std::string& name) {
  std::error_code error;
  auto from = std::filesystem::weakly_canonical(source, error);
  if (!from.has_filename()) from = from.parent_path();  // "a/" is "a"
  if (lies_in(std::filesystem::weakly_canonical(target, error), from))
    reject("DST", "a directory outside of " + name, target.string());
}

std::shared_ptr<const Checkpoint> Checkpoint::open(const std::filesystem::path& path) {
  return open_any(path, nullptr);
}

std::shared_ptr<const Checkpoint> Checkpoint::open(const std::filesystem::path& path,
                                                   std::vector<CheckpointDamage>& damage) {
  return open_any(path, &damage);
}

void Checkpoint::attempt(const std::string& file, const std::string& tensor,
                         const std::function<void()>& read) {
  if (damage_ == nullptr) return read();
  try {
    read();
  } catch (const Error& error) {
    damage_->push_back({file, tensor, error.what()});
  }
}

std::shared_ptr<const Checkpoint> Checkpoint::open_any(const std::filesystem::path& path,
                                                       std::vector<CheckpointDamage>* damage) {
  std::shared_ptr<Checkpoint> checkpoint(new Checkpoint);
  checkpoint->path_ = path;
  checkpoint->damage_ = damage;
  std::error_code error;
  if (path.extension() == ".safetensors") {
    checkpoint->add_file(path);
  } else if (!std::filesystem::is_directory(path, error)) {
    fail(ErrorCode::kNotFound, "{}: expected a model directory or a .safetensors file, found {}",
         path.string(), file_exists(path) ? "another kind of file" : "nothing of that name");
  } else if (file_exists(path / kIndexName)) {
    checkpoint->open_shards(path / kIndexName);
  } else if (file_exists(path / kSingleName)) {
    checkpoint->add_file(path / kSingleName);
  } else {
    fail(ErrorCode::kNotFound, "{}: expected {} or {}, found neither{}", path.string(), kIndexName,
         kSingleName, models_among_folders_of(path));
  }
  checkpoint->read_config();
  checkpoint->damage_ = nullptr;
  return checkpoint;
}

std::shared_ptr<const Checkpoint> Checkpoint::from_tensors(std::vector<Tensor> tensors, ModelConfig config) {
  std::shared_ptr<Checkpoint> checkpoint(new Checkpoint);
  checkpoint->path_ = "memory";
  checkpoint->config_ = std::move(config);
  checkpoint->in_memory_ = std::move(tensors);
  for (const Tensor& tensor : checkpoint->in_memory_) {
    if (checkpoint->tensors_.emplace(tensor.name, &tensor).second) continue;
    fail(ErrorCode::kInvalidArgument, "tensor '{}': expected it once, found it twice", tensor.name);
  }
  return checkpoint;
}

void Checkpoint::add_file(const std::filesystem::path& path) {
  const auto& file = files_.emplace_back(SafetensorsFile::open(path));
  for (const auto& [name, tensor] : file->tensors()) {
    const auto [it, inserted] = tensors_.emplace(name, &tensor);
    if (inserted) continue;
    attempt(path.string(), name, [&, &twice = name, &first = it->second->file] {
      fail(ErrorCode::kBadFile, "{}: tensor '{}': expected it once, found it in {} too", path.string(), twice,
           first);
    });
  }
}

void Checkpoint::open_shards(const std::filesystem::path& index_path) {
  const std::string file = index_path.string();
  const nlohmann::json index = read_json_object(index_path);
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object()) {
    fail(ErrorCode::kBadFile, "{}: expected an object 'weight_map' (tensor name -> file), found {}", file,
         map == index.end() ? "none" : map->type_name());
  }
  std::set<std::string> shards;
  for (const auto& [name, shard] : map->items()) {
    if (!shard.is_string()) {
      fail(ErrorCode::kBadFile, "{}: weight_map '{}': expected a file name, found {}", file, name,
           shard.type_name());
    }
    const std::filesystem::path shard_path = shard.get<std::string>();
    if (shard_path.native().size() > kMaxNameBytes) {
      fail(ErrorCode::kBadFile, "{}: weight_map '{}': expected a file name of at most {} bytes, found {}",
           file, name.substr(0, kMaxNameBytes), kMaxNameBytes, shard_path.native().size());
    }
    if (shard_path.empty() || shard_path != shard_path.filename() || shard_path == ".." ||
        shard_path == ".") {
      fail(ErrorCode::kBadFile,
           "{}: weight_map '{}': expected the name of a file beside the index, found '{}'", file, name,
           shard_path.string());
    }
    shards.insert(shard_path.string());
  }
  for (const std::string& shard : shards) {
    attempt((path_ / shard).string(), "", [&] {
      if (!file_exists(path_ / shard)) {
        fail(ErrorCode::kNotFound, "{}: expected the shard {}, found no such file; is the download complete?",
             file, (path_ / shard).string());
      }
      require_no_way_out(path_, shard, file);
      add_file(path_ / shard);
    });
  }
  if (files_.empty() && damage_ != nullptr && !damage_->empty()) {
    fail(ErrorCode::kBadFile, "{}", damage_->front().message);
  }
  std::set<std::string> readable;
  for (const auto& opened : files_) readable.insert(opened->path().string());
  for (const auto& [name, shard] : map->items()) {
    const Tensor* tensor = find(name);
    const std::string expected = (path_ / shard.get<std::string>()).string();
    if (tensor == nullptr) lost_.insert(name);
    if ((tensor != nullptr && tensor->file == expected) || !readable.contains(expected)) continue;
    attempt(file, name, [&, &promised = name] {
      fail(ErrorCode::kBadFile, "{}: weight_map '{}': expected the tensor in {}, found it in {}", file,
           promised, expected, tensor ? tensor->file : "no shard");
    });
  }
}

void Checkpoint::read_config() {
  const std::filesystem::path directory = path_.extension() == ".safetensors" ? path_.parent_path() : path_;
  const std::string file = (directory / "config.json").string();
  config_.file = file;
  attempt(file, "", [&] {
    if (!file_exists(directory / "config.json")) return;
    const nlohmann::json root = read_json_object(directory / "config.json");
    const auto text = root.find("text_config");  // multimodal models nest their language model's
    const nlohmann::json& config = text != root.end() && text->is_object() ? *text : root;
    config_.model_type = string_in(config, "model_type");
    if (const auto it = root.find("architectures");
        it != root.end() && it->is_array() && !it->empty() && it->front().is_string()) {
      config_.architecture = it->front().get<std::string>();
    }
    config_.hidden_act = string_in(config, "hidden_act");
    if (config_.hidden_act.empty()) config_.hidden_act = string_in(config, "mlp_hidden_act");
    config_.hidden = count_in(config, file, {"hidden_size"});
    config_.intermediate = count_in(config, file, {"moe_intermediate_size", "intermediate_size"});
    config_.experts = count_in(config, file, {"n_routed_experts", "num_local_experts", "num_experts"});
    config_.top_k = count_in(config, file, {"num_experts_per_tok", "experts_per_token"});
    config_.layers = count_in(config, file, {"num_hidden_layers"});
    config_.swiglu_limit = positive_in(config, file, "swiglu_limit");
    config_.swiglu_alpha = positive_in(config, file, "swiglu_alpha");
    config_.scoring_func = string_in(config, "scoring_func");
    config_.shared_experts = count_in(config, file, {"n_shared_experts"});
    config_.shared_intermediate =
        count_in(config, file, {"shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"});
    config_.routed_scaling_factor = positive_in(config, file, "routed_scaling_factor");
    config_.groups = count_in(config, file, {"n_group"});
    config_.top_groups = count_in(config, file, {"topk_group"});
    if (const auto it = config.find("norm_topk_prob"); it != config.end() && it->is_boolean()) {
      config_.renormalise = it->get<bool>();
    }
    if (const auto it = root.find("quantization_config"); it != root.end() && it->is_object()) {
      config_.claim = read_claim(*it);
    }
  });
  const std::string quantization_file = (directory / "hf_quant_config.json").string();
  attempt(quantization_file, "", [&] {
    if (!config_.claim.text.empty() || !file_exists(quantization_file)) return;
    const nlohmann::json root = read_json_object(quantization_file);
    if (const auto it = root.find("quantization"); it != root.end() && it->is_object()) {
      config_.claim = read_claim(*it);
    }
  });
  config_.quantization = config_.claim.text;
}

void Checkpoint::require_intact() const {
  for (const auto& file : files_) file->require_intact();
}

void Checkpoint::drop_pages() const {
  for (const auto& file : files_) file->drop_pages();
}

const Tensor* Checkpoint::find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : it->second;
}

}  // namespace fourfold
