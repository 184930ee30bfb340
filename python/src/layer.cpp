#include "layer.h"

#include <algorithm>
#include <utility>

#include "failures.h"

namespace fourfold::python {
namespace {

std::string place_name(Device device) {
  return device.kind == Device::Kind::kHost ? "the host" : fmt::format("cuda:{}", device.index);
}

/// Copies of host arrays in a backend's memory; what was written there comes back with fetch().
class DeviceCopies {
 public:
  explicit DeviceCopies(const Memory& memory) : memory_(memory) {}

  template <class T>
  std::span<T> bring(std::span<T> host) {
    const MatrixView<T> row(host.data(), host.empty() ? 0 : 1, static_cast<int64_t>(host.size()));
    return {bring(row).data, host.size()};
  }
  /// Row by row: a view's rows may lie apart.
  template <class T>
  MatrixView<T> bring(const MatrixView<T>& host) {
    if (host.rows * host.cols == 0) return host;
    const size_t row_bytes = static_cast<size_t>(host.cols) * sizeof(T);
    Buffer& copy = buffers_.emplace_back(memory_.allocate(row_bytes * static_cast<size_t>(host.rows)));
    T* first = reinterpret_cast<T*>(copy.data());
    for (int64_t r = 0; r < host.rows; ++r) {
      std::byte* row = copy.data() + static_cast<size_t>(r) * row_bytes;
      memory_.copy_from_host(row, host.row(r), row_bytes);
      if constexpr (!std::is_const_v<T>) outputs_.push_back({host.row(r), row, row_bytes});
    }
    return {first, host.rows, host.cols, host.cols, memory_.device()};
  }
  StagedActivations bring(const StagedActivations& host) {
    return {bring(host.values),         bring(host.codes),           bring(host.scales),
            bring(host.residual_codes), bring(host.residual_scales), bring(host.row_scales)};
  }

  /// Waits for the backend and copies what it wrote to the host.
  void fetch() const {
    memory_.synchronize();
    for (const Output& output : outputs_) memory_.copy_to_host(output.host, output.device, output.bytes);
  }

 private:
  struct Output {
    void* host;
    const void* device;
    size_t bytes;
  };

  const Memory& memory_;
  std::vector<Buffer> buffers_;
  std::vector<Output> outputs_;
};

/// Taps by name -> views; throws Error for a name that is none.
class TapReader {
 public:
  TapReader(const std::map<std::string, WritableArray>& arrays, Device device) {
    for (const auto& [name, array] : arrays) {
      const ArrayView view = view_of(array, "tap " + name);
      if (view.device != device) reject(view.name, "memory of " + place_name(device), view.describe());
      left_.emplace(name, view);
    }
  }

  std::span<int32_t> integers(const std::string& name) { return take<std::span<int32_t>>(name, i32_vector); }
  std::span<float> floats(const std::string& name) { return take<std::span<float>>(name, f32_vector); }
  MatrixView<Bf16> matrix(const std::string& name) { return take<MatrixView<Bf16>>(name, bf16_matrix); }
  StagedActivations staged(const std::string& name) {
    StagedActivations views;
    views.values = matrix(name + ".values");
    views.codes = take<MatrixView<uint8_t>>(name + ".codes", byte_matrix);
    views.scales = take<MatrixView<uint8_t>>(name + ".scales", byte_matrix);
    views.residual_codes = take<MatrixView<uint8_t>>(name + ".residual_codes", byte_matrix);
    views.residual_scales = take<MatrixView<uint8_t>>(name + ".residual_scales", byte_matrix);
    views.row_scales = floats(name + ".row_scales");
    return views;
  }
  void require_all_taken() const {
    if (!left_.empty()) reject("taps", "names of stages", "'" + left_.begin()->first + "'");
  }

 private:
  template <class View, class Read>
  View take(const std::string& name, Read read) {
    const auto found = left_.find(name);
    if (found == left_.end()) return {};
    const View view = read(found->second);
    left_.erase(found);
    return view;
  }

  std::map<std::string, ArrayView> left_;
};

/// The stages' views, and what StageTaps points to.
struct Taps {
  StagedActivations staged_x, staged_intermediate, shared_x, shared_intermediate;
  StageTaps views;

  Taps(const std::map<std::string, WritableArray>& arrays, Device device) {
    TapReader read(arrays, device);
    views.group_offsets = read.integers("group_offsets");
    views.slot_of_row = read.integers("slot_of_row");
    views.row_of_slot = read.integers("row_of_slot");
    views.h = read.matrix("h");
    views.activation = read.matrix("activation");
    views.z = read.matrix("z");
    views.shared.h = read.matrix("shared.h");
    views.shared.activation = read.matrix("shared.activation");
    views.shared.z = read.matrix("shared.z");
    views.shared.z_weight = read.floats("shared.z_weight");
    staged_x = read.staged("staged_x");
    staged_intermediate = read.staged("staged_intermediate");
    shared_x = read.staged("shared.staged_x");
    shared_intermediate = read.staged("shared.staged_intermediate");
    read.require_all_taken();
    point();
  }
  Taps(const Taps&) = delete;
  Taps& operator=(const Taps&) = delete;

  void bring(DeviceCopies& copies) {
    for (auto* integers : {&views.group_offsets, &views.slot_of_row, &views.row_of_slot}) {
      *integers = copies.bring(*integers);
    }
    for (auto* matrix : {&views.h, &views.activation, &views.z, &views.shared.h, &views.shared.activation,
                         &views.shared.z}) {
      *matrix = copies.bring(*matrix);
    }
    views.shared.z_weight = copies.bring(views.shared.z_weight);
    for (auto* staged : {&staged_x, &staged_intermediate, &shared_x, &shared_intermediate}) {
      *staged = copies.bring(*staged);
    }
  }

 private:
  static const StagedActivations* or_null(const StagedActivations& staged) {
    return staged.values.empty() && staged.codes.empty() ? nullptr : &staged;
  }
  void point() {
    views.staged_x = or_null(staged_x);
    views.staged_intermediate = or_null(staged_intermediate);
    views.shared.staged_x = or_null(shared_x);
    views.shared.staged_intermediate = or_null(shared_intermediate);
  }
};

Routing routing_of(const ArrayView& ids, const ArrayView& weights) {
  Routing routing;
  if (ids.is(Element::kI64)) {
    routing.topk_ids = MatrixView<const int64_t>(i64_matrix(ids));
  } else if (ids.is(Element::kI32)) {
    routing.topk_ids = MatrixView<const int32_t>(i32_matrix(ids));
  } else {
    reject("topk_ids", "int32 or int64", ids.describe());
  }
  routing.topk_weights = f32_matrix(weights);
  return routing;
}

OutputView output_of(const ArrayView& y) {
  if (y.is(Element::kF32)) return f32_matrix(y);
  return bf16_matrix(y);
}

/// Brings the arguments of a call to the backend's memory. `local_experts` is not set by this module.
void bring(ForwardArgs& args, Taps& taps, DeviceCopies& copies) {
  args.x = copies.bring(args.x);
  std::visit([&](auto& ids) { ids = copies.bring(ids); }, args.routing.topk_ids);
  args.routing.topk_weights = copies.bring(args.routing.topk_weights);
  std::visit([&](auto& y) { y = copies.bring(y); }, args.y);
  args.status = copies.bring(std::span<int32_t>(args.status, 1)).data();
  taps.bring(copies);
}

}  // namespace

Buffer WorkspacePool::take(size_t bytes) {
  {
    const std::scoped_lock lock(mutex_);
    const auto fits =
        std::find_if(free_.begin(), free_.end(), [&](const Buffer& one) { return one.bytes() >= bytes; });
    if (fits != free_.end()) {
      Buffer taken = std::move(*fits);
      free_.erase(fits);
      return taken;
    }
    if (!free_.empty()) free_.pop_back();  // outgrown
  }
  return memory_.allocate(bytes);
}

void WorkspacePool::give_back(Buffer buffer) {
  const std::scoped_lock lock(mutex_);
  free_.push_back(std::move(buffer));
}

Layer::Layer(std::shared_ptr<const ExpertWeights> weights, const LayerConfig& config,
             const LayerOptions& options, const std::string& backend)
    : choice_(choose_backend(backend, *weights, config, options)),
      memory_(choice_.backend->memory()),
      layer_(choice_.backend->make_layer(*weights, config, options)),
      pool_(memory_) {}

void Layer::update_weights(std::shared_ptr<const ExpertWeights> weights) {
  layer_->update_weights(*weights);
}

int32_t Layer::forward(const LayerPlan& plan, const ForwardArrays& arrays, void* stream) {
  const ArrayView x = view_of(arrays.x, "x"), ids = view_of(arrays.topk_ids, "topk_ids"),
                  weights = view_of(arrays.topk_weights, "topk_weights"), y = view_of(arrays.y, "out");
  const bool through_copies = x.device == Device::host() && memory_.device() != Device::host();
  const Device expected = through_copies ? Device::host() : memory_.device();
  const auto require_place = [&](const ArrayView& array) {
    if (array.device == expected) return;
    reject(array.name,
           fmt::format("memory of {}, like the layer (backend {})", place_name(expected), backend().name()),
           array.describe());
  };
  for (const ArrayView* array : {&x, &ids, &weights, &y}) require_place(*array);

  int32_t own_status = kStatusOk;
  ForwardArgs args;
  args.x = bf16_matrix(x);
  args.routing = routing_of(ids, weights);
  args.y = output_of(y);
  args.stream = stream;
  if (arrays.status) {
    const ArrayView status = view_of(*arrays.status, "status");
    require_place(status);
    status.require_shape({1});
    args.status = i32_vector(status).data();
  } else if (expected == Device::host()) {
    args.status = &own_status;
  }
  Taps taps(arrays.taps, expected);
  if (arrays.workspace && !through_copies) {
    const ArrayView workspace = view_of(*arrays.workspace, "workspace");
    require_place(workspace);
    args.workspace = std::as_writable_bytes(bytes(workspace));
    args.taps = taps.views;
    const nb::gil_scoped_release release;
    layer_->forward(plan, args);
    return own_status;
  }
  const nb::gil_scoped_release release;
  Buffer workspace = pool_.take(plan.workspace_bytes);
  args.workspace = {workspace.data(), workspace.bytes()};
  DeviceCopies copies(memory_);
  if (through_copies) bring(args, taps, copies);
  args.taps = taps.views;
  layer_->forward(plan, args);
  if (memory_.device() != Device::host()) copies.fetch();
  pool_.give_back(std::move(workspace));
  return own_status;
}

}  // namespace fourfold::python
