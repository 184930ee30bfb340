// The backends that are compiled in, as C sees them.
#include <deque>

#include "c_api/guard.h"
#include "fourfold/moe_layer.h"

namespace {

using namespace fourfold;

struct BackendTexts {
  std::string name, description, why_unavailable;
  bool on_device;
};

/// What a machine can run does not change while a program runs.
const std::deque<BackendTexts>& all_texts() {
  static const std::deque<BackendTexts> texts = [] {
    std::deque<BackendTexts> list;
    for (const Backend* backend : backends()) {
      std::string why_unavailable = backend->why_unavailable();
      const bool on_device =
          why_unavailable.empty() && backend->memory().device().kind != Device::Kind::kHost;
      list.push_back({std::string(backend->name()), std::string(backend->description()),
                      std::move(why_unavailable), on_device});
    }
    return list;
  }();
  return texts;
}

}  // namespace

int32_t fourfold_backend_count(void) {
  return static_cast<int32_t>(backends().size());
}

fourfold_status fourfold_backend_describe(int32_t index, fourfold_backend_info* info) {
  return c_api::guarded([&] {
    if (index < 0 || index >= fourfold_backend_count()) {
      reject("backend index", fmt::format("0 to {}", fourfold_backend_count() - 1), index);
    }
    const BackendTexts& texts = all_texts()[static_cast<size_t>(index)];
    fourfold_backend_info known = {};
    known.name = texts.name.c_str();
    known.description = texts.description.c_str();
    known.why_unavailable = texts.why_unavailable.c_str();
    known.on_device = texts.on_device;
    c_api::write_struct(known, info, "fourfold_backend_info");
  });
}
