// How an engine may deviate from the specification: one value for everything that the known faults change.
// A default Deviation is the specification; a fault sets some members, a pair of faults sets those of both.
#pragma once

#include <cstdint>
#include <optional>

#include "fourfold/activations.h"
#include "fourfold/moe_layer.h"
#include "fourfold/router.h"

namespace fourfold::diagnosis {

/// Where the engine finds a block's scale. Gate and up lie in one array of 2I rows, gate first, an expert
/// after another.
enum class ScaleOrder : uint8_t {
  kRight,
  kTransposed,        ///< (N, K_sf) read as (K_sf, N)
  kTransposedHalves,  ///< the same, gate and up each by themselves
  kLinearAsSwizzled,  ///< row-major scales, offsets of the 128x4 layout
  kSwizzledAsLinear,  ///< 128x4 scales, row-major offsets
  kUnpaddedStride,    ///< 128x4 scales; the next expert looked for after N x K_sf bytes, without padding
};

/// What a scale's byte is taken for.
enum class ScaleCode : uint8_t {
  kRight,
  kE8m0,          ///< 2^(byte - 127)
  kSaturated240,  ///< exponent 15 is not there: 256 to 448 become 240
  kFnuz,          ///< e4m3fnuz, whose bias is 8: half the value
};

enum class GlobalUse : uint8_t { kRight, kDropped, kReciprocal };

/// The last K % tail_tile values of a row.
enum class KTail : uint8_t {
  kRight,
  kDropped,   ///< not multiplied
  kOverRead,  ///< multiplied, and beyond them the start of the next row, up to a whole tile
};

/// How a weight matrix is read.
struct WeightReading {
  ScaleOrder scale_order = ScaleOrder::kRight;
  ScaleCode scale_code = ScaleCode::kRight;
  bool swapped_nibbles = false;
  int wrong_code = -1;  ///< of e2m1, 1 to 7: decoded as `wrong_value`; -1: none
  float wrong_value = 0.0f;
  GlobalUse global = GlobalUse::kRight;
  KTail tail = KTail::kRight;
  int tail_tile = 0;

  bool operator==(const WeightReading&) const = default;
};

enum class WeightSource : uint8_t { kStored, kFolded, kQuantizedAgain, kLayerBefore, kLayerAfter };

/// Which expert's weights a row is multiplied by, instead of its own expert e's.
enum class ExpertMap : uint8_t {
  kRight,
  kNext,         ///< e + 1
  kPrevious,     ///< e - 1
  kModuloRanks,  ///< e mod E/ranks: every rank computes with the first one's experts
  kRoundRobin,   ///< contiguous experts taken for round-robin ones over `expert_ranks`
  kOfTile,       ///< the expert of the first row of a tile of `expert_tile` rows
};

enum class GateUpRows : uint8_t {
  kRight,
  kSwapped,              ///< with their global scales and biases
  kRowsSwapped,          ///< without their global scales
  kHalvesAsInterleaved,  ///< gate's rows, then up's, read as gate even and up odd
  kInterleavedAsHalves,  ///< the reverse
};

enum class GateUpGlobal : uint8_t { kOwn, kGate, kUp, kLarger };

/// Global scale of NVFP4 activations: what quantizes, and what goes into alpha.
enum class InputScaleUse : uint8_t {
  kRight,
  kDroppedFromAlpha,
  kReciprocalInAlpha,
  kReciprocalInStaging,
  kFirstExpert,         ///< of expert 0, in both
  kFirstExpertInAlpha,  ///< of expert 0, in alpha alone
  kOne,                 ///< 1 in both: never loaded
};

enum class ClampForm : uint8_t {
  kRight,
  kGateBothSides,  ///< clamp(g, -L, L) for min(g, L)
  kUpFromAbove,    ///< min(u, L) for clamp(u, -L, L)
  kGateAlone,      ///< up is not clamped
  kUpAlone,        ///< gate is not clamped
};

/// Changes of the activation function; absent members are right.
struct ActivationChange {
  std::optional<ActivationKind> kind;
  std::optional<float> alpha, beta, limit;
  ClampForm clamp = ClampForm::kRight;
  bool relu_not_squared = false;

  bool operator==(const ActivationChange&) const = default;
};

enum class DownBias : uint8_t { kRight, kMissing, kUnweighted };

/// How ids and weights of a token come to be. All but `pairing` and `factor` need the router.
enum class WeightPairing : uint8_t {
  kRight,
  kWeightsReversed,  ///< weights best first, ids worst first
  kIdsSorted,        ///< ids ascending, weights as they were
};
struct RoutingChange {
  bool bias_in_weights = false;  ///< biased scores become weights
  bool bias_ignored = false;     ///< selection on scores alone
  bool groups_ignored = false;
  std::optional<bool> renormalise;
  std::optional<RouterScore> score;
  WeightPairing pairing = WeightPairing::kRight;
  float factor = 1.0f;  ///< on all weights

  bool operator==(const RoutingChange&) const = default;
  bool needs_router() const {
    return bias_in_weights || bias_ignored || groups_ignored || renormalise || score;
  }
};

enum class WeightUse : uint8_t { kRight, kMissing, kOnInput, kOnOutput, kTwice };

enum class Missing : uint8_t {
  kNothing,
  kUpperExperts,  ///< those from E/2: another rank's sum was not added
  kLowerExperts,
  kUpperInner,  ///< intermediate channels from I/2
  kLowerInner,
};

enum class TokenOrder : uint8_t {
  kRight,
  kNext,      ///< row t holds token t + 1
  kPrevious,  ///< row t holds token t - 1
  kReversed,
  kSlotModulo,  ///< experts are fed with token slot % T instead of slot / K
};

struct SharedUse {
  int times = 1;
  bool gate_ignored = false;
  float factor = 1.0f;  ///< on its output: the routed experts' scaling factor
  bool not_clamped = false;

  bool operator==(const SharedUse&) const = default;
};

/// What changes h, the output of the first GEMM.
struct FirstDeviation {
  WeightSource source = WeightSource::kStored;
  ExpertMap expert_map = ExpertMap::kRight;
  int expert_ranks = 1, expert_tile = 0;
  bool own_input_scales =
      false;  ///< activations are staged, and alpha is, by the input scales of the right expert
  WeightReading reading;
  GateUpRows rows = GateUpRows::kRight;
  GateUpGlobal global = GateUpGlobal::kOwn;
  InputScaleUse input_scale = InputScaleUse::kRight;
  bool scale_groups_unpadded = false;  ///< of x: a group's swizzled scales looked for without padding
  int rows_padded_to = 0;              ///< groups of x's rows are, and are read as if they were not; 0: no
  bool bias_missing = false;
  RoutingChange routing;
  WeightUse weight = WeightUse::kRight;
  TokenOrder tokens = TokenOrder::kRight;

  bool operator==(const FirstDeviation&) const = default;
};

/// Everything, by stages.
struct Deviation {
  FirstDeviation first;
  ActivationChange activation;
  WeightReading down;
  InputScaleUse intermediate_scale = InputScaleUse::kRight;
  DownBias down_bias = DownBias::kRight;
  SharedUse shared;
  Missing missing = Missing::kNothing;

  bool operator==(const Deviation&) const = default;
};

/// How activations are staged: no fault, but an engine's choice.
struct Staging {
  ActivationFormat format = ActivationFormat::kBf16;
  ScalePolicy policy = ScalePolicy::kDynamicToken;  ///< NVFP4 alone, x and intermediate alike

  bool operator==(const Staging&) const = default;
};

}  // namespace fourfold::diagnosis
