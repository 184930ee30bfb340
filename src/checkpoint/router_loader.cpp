// The router of a layer: its tensors by name. How it computes is given: fourfold/model_family.h.
#include <cstring>
#include <optional>
#include <set>
#include <string>

#include "base/fail.h"
#include "checkpoint/linear_reader.h"
#include "checkpoint/moe_names.h"

namespace fourfold {
namespace {

/// tid2eid, [vocabulary, top_k] of I64 or I32, copied to where it is aligned.
std::vector<int64_t> read_hash_table(const Tensor& tensor, int64_t top_k, int64_t experts) {
  const bool wide = tensor.dtype == DType::kI64;
  if ((!wide && tensor.dtype != DType::kI32) || tensor.shape.size() != 2 || tensor.shape[1] != top_k ||
      tensor.shape[0] == 0) {
    bad_tensor(tensor, fmt::format("I64 or I32 [vocabulary, {}]", top_k));
  }
  std::vector<int64_t> table(static_cast<size_t>(tensor.elements()));
  for (size_t i = 0; i < table.size(); ++i) {
    int32_t narrow = 0;
    const std::byte* source = tensor.data + i * (wide ? sizeof(int64_t) : sizeof(int32_t));
    std::memcpy(wide ? static_cast<void*>(&table[i]) : &narrow, source,
                wide ? sizeof(int64_t) : sizeof(int32_t));
    if (!wide) table[i] = narrow;
    if (table[i] < 0 || table[i] >= experts) {
      fail(ErrorCode::kBadFile, "{}: tensor '{}', token id {}: expected experts 0 to {}, found {}",
           tensor.file, tensor.name, static_cast<int64_t>(i) / top_k, experts - 1, table[i]);
    }
  }
  return table;
}

/// The bias beside a router's weight, and what it is added to; null where there is none that may be there.
struct FoundBias {
  const Tensor* tensor = nullptr;
  bool corrects_scores = false;
};

/// DeepSeek-V4 calls its correction bias plain "bias", which elsewhere belongs to the logits.
FoundBias find_bias(const Checkpoint& checkpoint, const std::string& name, RouterBias kind) {
  const Tensor *plain = checkpoint.find(name + ".bias"),
               *correction = checkpoint.find(name + ".e_score_correction_bias");
  switch (kind) {
    case RouterBias::kNone:
      return {};
    case RouterBias::kLogits:
      return {plain, false};
    case RouterBias::kCorrection:
      return {correction ? correction : plain, true};
    case RouterBias::kByName:
      return correction ? FoundBias{correction, true} : FoundBias{plain, false};
  }
  return {};
}

/// Tensors of this router or a second one that nothing reads would change the routing.
void require_all_known(const Checkpoint& checkpoint, const MoeBlock& block,
                       const std::set<std::string>& known) {
  for (const std::string_view child : kRouters) {
    for (const Tensor* tensor : tensors_under(checkpoint, block.prefix + std::string(child))) {
      if (known.contains(tensor->name)) continue;
      fail(
          ErrorCode::kUnsupported,
          "{}: tensor '{}': expected one router's weight, tid2eid and the bias that its family has, found {} "
          "too, which would be left out",
          tensor->file, tensor->name, tensor->describe());
    }
  }
}

}  // namespace

std::optional<CheckpointRouter> load_router(const Checkpoint& checkpoint, int64_t layer, int64_t experts,
                                            int64_t hidden, const RouterConfig& config, RouterBias bias,
                                            std::string& why_not) {
  const MoeBlock block = find_block(checkpoint, layer);
  CheckpointRouter router;
  router.config = config;
  const Tensor* weight = nullptr;
  for (const std::string_view child : kRouters) {
    const std::string name = block.prefix + std::string(child.substr(0, child.size() - 1));
    const Tensor* found = checkpoint.find(name + ".weight");
    if (found == nullptr || weight != nullptr) continue;
    weight = found;
    router.name = name;
  }
  if (weight == nullptr) {
    why_not =
        fmt::format("the checkpoint has no '{}gate.weight' or '{}router.weight'", block.prefix, block.prefix);
    return std::nullopt;
  }
  std::set<std::string> known = {weight->name};
  router.weights.weight = dense_tensor(*weight, {experts, hidden});
  if (const Tensor* table = checkpoint.find(router.name + ".tid2eid")) {
    router.hash_table =
        std::make_shared<const std::vector<int64_t>>(read_hash_table(*table, config.top_k, experts));
    router.weights.experts_of_token = {router.hash_table->data(), table->shape[0], config.top_k};
    known.insert(table->name);
  }
  const FoundBias found = find_bias(checkpoint, router.name, bias);
  if (found.tensor != nullptr) {
    (found.corrects_scores ? router.weights.correction_bias : router.weights.bias) =
        dense_tensor(*found.tensor, {experts});
    known.insert(found.tensor->name);
  } else if (bias == RouterBias::kCorrection && router.hash_table == nullptr) {
    fail(ErrorCode::kBadFile,
         "{}: expected a tensor '{}.e_score_correction_bias' or '{}.bias' beside the router's weight, found "
         "neither",
         checkpoint.path().string(), router.name, router.name);
  }
  require_all_known(checkpoint, block, known);
  return router;
}

}  // namespace fourfold
