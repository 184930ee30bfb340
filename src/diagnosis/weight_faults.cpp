// Known faults of how weights are read (faults.h).
#include <fmt/format.h>

#include "diagnosis/fault_list.h"

namespace fourfold::diagnosis {
namespace {

void drop_tail(WeightReading& reading, const Fault& fault) {
  reading.tail = KTail::kDropped;
  reading.tail_tile = fault.code;
}

class WeightFaults : FaultList {
 public:
  WeightFaults(const Subject& subject, std::vector<Fault>& faults) : FaultList(subject, faults) {}

  void add_all() {
    if (has_blocks()) add_scale_faults();
    if (has_blocks()) add_code_faults();
    add_global_faults();
    add_tail_faults();
    add_gate_up_faults();
    add_source_faults();
  }

 private:
  /// Three faults: in both weights, in w13 and in w2 alone. `sentence` has a {} for which.
  template <auto change>
  void add_reading(const std::string& id, const std::string& sentence, const std::string& remedy,
                   int code = 0) {
    const auto both = [](Deviation& d, const Fault& f) {
      change(d.first.reading, f);
      change(d.down, f);
    };
    const auto first = [](Deviation& d, const Fault& f) { change(d.first.reading, f); };
    const auto second = [](Deviation& d, const Fault& f) { change(d.down, f); };
    const auto add_one = [&](const char* suffix, Apply apply, const char* which) {
      add(id + suffix, FaultPlace::kWeights, apply, fmt::format(fmt::runtime(sentence), which), remedy).code =
          code;
    };
    add_one("", both, "w13 and w2");
    add_one(".w13", first, "w13 (gate and up)");
    add_one(".w2", second, "w2 (down)");
  }

  template <ScaleOrder order>
  void add_scale_order(const std::string& id, const std::string& sentence, const std::string& remedy) {
    add_reading<[](WeightReading& r, const Fault&) { r.scale_order = order; }>(id, sentence, remedy);
  }

  template <ScaleCode code>
  void add_scale_code(const std::string& id, const std::string& sentence, const std::string& remedy) {
    add_reading<[](WeightReading& r, const Fault&) { r.scale_code = code; }>(id, sentence, remedy);
  }

  void add_scale_faults() {
    add_scale_order<ScaleOrder::kTransposed>(
        "scales-transposed", "block scales of {} are read as (K_sf, N) where the checkpoint stores (N, K_sf)",
        "the loader's transpose of weight_scale, and strides of the scale tensor");
    if (gated()) {
      add(
          "scales-transposed-halves", FaultPlace::kWeights,
          [](Deviation& d, const Fault&) { d.first.reading.scale_order = ScaleOrder::kTransposedHalves; },
          "block scales of gate and of up are each read as (K_sf, I) where the checkpoint stores (I, K_sf)",
          "the loader's transpose of weight_scale, before gate and up are put together");
    }
    add_scale_order<ScaleOrder::kLinearAsSwizzled>(
        "scales-linear-as-swizzled", "block scales of {} lie row-major and the kernel reads the 128x4 layout",
        "the swizzle after loading (to_blocked, swizzle_blockscale): it is missing");
    add_scale_order<ScaleOrder::kSwizzledAsLinear>(
        "scales-swizzled-as-linear", "block scales of {} are swizzled to 128x4 and the kernel reads rows",
        "a swizzle that this kernel does not want, or that was done twice");
    add_scale_order<ScaleOrder::kUnpaddedStride>(
        "scales-unpadded-stride",
        "in {} the next expert's swizzled scales are looked for after N x K_sf bytes, "
        "without the padding to 128 x 4",
        "the per-expert stride of swizzled scales: round N up to 128 and K_sf to 4");
    if (!is_nvfp4()) return;
    add_scale_code<ScaleCode::kE8m0>(
        "scales-as-e8m0", "block scales of {} are e4m3 and are read as e8m0 (2^(byte - 127))",
        "the scale dtype that the kernel was built for: MXFP4's instead of NVFP4's");
    add_scale_code<ScaleCode::kSaturated240>(
        "scales-saturated-240", "block scales of {} above 240 become 240: exponent 15 is taken for infinity",
        "the e4m3 decoder: e4m3fn has values in exponent 15, and only 0x7F is NaN");
    add_scale_code<ScaleCode::kFnuz>("scales-as-fnuz",
                                     "block scales of {} are read as e4m3fnuz: half of what they are",
                                     "the e4m3 flavour: AMD's fnuz has a bias of 8");
  }

  void add_code_faults() {
    add_reading<[](WeightReading& r, const Fault&) { r.swapped_nibbles = true; }>(
        "nibbles-swapped", "the two codes in a byte of {} are swapped: the even index lies in the low nibble",
        "the unpacking of e2m1 pairs");
    for (int code = 1; code <= 7; ++code) {
      for (const float value : {decode_e2m1(static_cast<uint8_t>(code - 1)),
                                code == 7 ? 8.0f : decode_e2m1(static_cast<uint8_t>(code + 1))}) {
        faults_.push_back(wrong_code_fault(code, value));
      }
    }
  }

  void add_global_faults() {
    if (!is_nvfp4()) return;
    add_reading<[](WeightReading& r, const Fault&) { r.global = GlobalUse::kDropped; }>(
        "weight-global-dropped", "the global scale of {} (weight_scale_2) is not applied",
        "alpha, or the loading of weight_scale_2 / weight_global_scale");
    add_reading<[](WeightReading& r, const Fault&) { r.global = GlobalUse::kReciprocal; }>(
        "weight-global-reciprocal", "the global scale of {} is applied as its reciprocal",
        "ModelOpt's weight_scale_2 multiplies, compressed-tensors' weight_global_scale divides");
  }

  void add_tail_faults() {
    for (const int tile : {64, 128, 256}) {
      const auto cuts = [&](int64_t k) { return k > tile && k % tile != 0; };
      const bool first = cuts(subject_.hidden()), second = cuts(subject_.intermediate());
      const std::string sentence =
          fmt::format("the last K % {} values of a row of {{}} are not multiplied", tile);
      const std::string remedy = "the loop over K, and whether its bound is rounded down to a tile";
      const auto add_one = [&](const char* suffix, Apply apply, const char* which) {
        add(fmt::format("k-tail-dropped-{}{}", tile, suffix), FaultPlace::kWeights, apply,
            fmt::format(fmt::runtime(sentence), which), remedy)
            .code = tile;
      };
      if (first)
        add_one(
            ".w13", [](Deviation& d, const Fault& f) { drop_tail(d.first.reading, f); }, "w13");
      if (second)
        add_one(
            ".w2", [](Deviation& d, const Fault& f) { drop_tail(d.down, f); }, "w2");
      if (subject_.hidden() % tile != 0 && tile == 128) {
        add(
            "k-tail-over-read.w13", FaultPlace::kWeights,
            [](Deviation& d, const Fault& f) {
              d.first.reading.tail = KTail::kOverRead;
              d.first.reading.tail_tile = f.code;
            },
            "K is rounded up to 128 and the start of the next row is read as data, in x and in w13",
            "padding of K: it must be zero, or masked")
            .code = tile;
      }
    }
  }

  void add_gate_up_faults() {
    if (!gated()) return;
    const std::string order =
        "the order in which w1 (gate) and w3 (up) are put into w13, and in which the activation reads it";
    add(
        "gate-up-swapped", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.rows = GateUpRows::kSwapped; }, "gate and up are swapped",
        order);
    add(
        "gate-up-rows-swapped", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.rows = GateUpRows::kRowsSwapped; },
        "gate's and up's rows are swapped, their global scales are not", order);
    add(
        "gate-up-read-interleaved", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.rows = GateUpRows::kHalvesAsInterleaved; },
        "w13 has gate's rows before up's and is read as interleaved (gate even, up odd)", order);
    add(
        "gate-up-read-as-halves", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.rows = GateUpRows::kInterleavedAsHalves; },
        "w13 is interleaved (gate even, up odd) and is read as gate's rows before up's", order);
    if (!is_nvfp4()) return;
    const std::string alpha = "alpha of the first GEMM: gate and up have a weight_scale_2 each";
    add(
        "gate-global-for-up", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.global = GateUpGlobal::kGate; },
        "gate's global scale is used for up too", alpha);
    add(
        "up-global-for-gate", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.global = GateUpGlobal::kUp; },
        "up's global scale is used for gate too", alpha);
    add(
        "larger-global-without-rescale", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.global = GateUpGlobal::kLarger; },
        "the larger of gate's and up's global scales is used for both, and block scales are not rescaled",
        alpha);
  }

  void add_source_faults() {
    if (is_nvfp4()) {
      add(
          "quantized-again", FaultPlace::kWeights,
          [](Deviation& d, const Fault&) { d.first.source = WeightSource::kQuantizedAgain; },
          "weights were dequantized to bf16 and quantized again, gate and up as one tensor",
          "the loader: codes and block scales should reach the kernel as they are");
      if (gated()) {
        add(
            "gate-up-folded", FaultPlace::kWeights,
            [](Deviation& d, const Fault&) { d.first.source = WeightSource::kFolded; },
            "gate and up share the larger global scale, and the other's block scales were rescaled and "
            "rounded to e4m3",
            "not a bug, a loss: kernels that take one alpha an expert need it (layertest --gate-up fold "
            "shows its size)");
      }
    }
    const std::string remedy = "the layer index in the loader's names";
    if (subject_.layer_before) {
      add(
          "layer-before", FaultPlace::kWeights,
          [](Deviation& d, const Fault&) { d.first.source = WeightSource::kLayerBefore; },
          "the experts are those of the layer before", remedy);
    }
    if (subject_.layer_after) {
      add(
          "layer-after", FaultPlace::kWeights,
          [](Deviation& d, const Fault&) { d.first.source = WeightSource::kLayerAfter; },
          "the experts are those of the layer after", remedy);
    }
  }
};

}  // namespace

void add_weight_faults(const Subject& subject, std::vector<Fault>& faults) {
  WeightFaults(subject, faults).add_all();
}

}  // namespace fourfold::diagnosis
