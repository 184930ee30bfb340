// Gather, weigh, quantize and decode rows: a block of threads a row, a thread sixteen values. Where the rows
// of a token are known, a block of threads a token instead: it reads the token once, and writes its rows.
// With many tokens that halves the traffic: rows are sorted by expert, so that the tokens of two experts in
// turn are long out of the cache.
//
// Where rows are tokens or slots, no kernel has to have told which: then staging may begin beside the one
// before it (StageArgs::beside_previous), and reads what comes from outside past L1, in which its
// multiprocessor may have kept lines of an earlier call.
#include <algorithm>
#include <string>

#include "cuda/expert_ids.cuh"
#include "cuda/launch.cuh"
#include "cuda/quantize_rows.cuh"
#include "cuda/stage.h"
#include "fourfold/quantize.h"

namespace fourfold::cuda {
namespace {

/// RowSource for kernels.
struct Source {
  Rows<const Bf16> rows;
  const int32_t* slot_of_row;
  const int32_t* row_of_slot;
  int32_t top_k;
  const float* weights;
  int64_t weight_stride;
};

/// One row of it.
struct SourceRow {
  const Bf16* data;
  float weight;
  bool aligned, weighted;

  __device__ void load(int32_t block, float (&x)[kNvfp4Block]) const {
    load_block(data + int64_t{block} * kNvfp4Block, aligned, x);
    if (!weighted) return;
#pragma unroll
    for (float& value : x) value = static_cast<float>(encode_bf16(weight * value));
  }
};

struct StageParams {
  Source source;
  bool by_slot;  // rows are the slots of `ids`
  ExpertIds ids;
  const int32_t* group_offsets;  // null: `rows` rows
  int32_t groups, rows, blocks;  // blocks: sixteens of a row
  ScalePolicy policy;
  const float* expert_scales;
  const float* tensor_amax;
  QuantizedRows out;
  float* row_scales;
  Rows<Bf16> values;
  float* tapped_row_scales;
  bool beside_previous;
  int32_t* cleared;
  int32_t cleared_words;
};

/// The first thing that a kernel of staging does, and the last. What is cleared lies in L2 before the next
/// kernel is let go, where its atomics and acquiring loads look.
__device__ void begin_staging(const StageParams& p) {
  if (!p.beside_previous) cudaGridDependencySynchronize();
  if (p.cleared_words > 0 && blockIdx.x == 0 && blockIdx.y == 0) {
    for (auto i = static_cast<int32_t>(threadIdx.x); i < p.cleared_words;
         i += static_cast<int32_t>(blockDim.x)) {
      p.cleared[i] = 0;
    }
    __threadfence();
    __syncthreads();
  }
  cudaTriggerProgrammaticLaunchCompletion();
}
__device__ void end_staging(const StageParams& p) {
  if (p.beside_previous) cudaGridDependencySynchronize();
}

__device__ SourceRow row_of(const Source& source, int32_t row) {
  if (source.slot_of_row == nullptr) return {source.rows.row(row), 1.0f, source.rows.aligned, false};
  const int32_t slot = source.slot_of_row[row], token = slot / source.top_k;
  const bool weighted = source.weights != nullptr;
  const float weight = weighted ? source.weights[token * source.weight_stride + slot % source.top_k] : 1.0f;
  return {source.rows.row(token), weight, source.rows.aligned, weighted};
}

/// Largest magnitude of a row, the same in every thread.
__device__ float row_amax(const SourceRow& row, int32_t blocks) {
  uint32_t amax = 0;
  for (auto block = static_cast<int32_t>(threadIdx.x); block < blocks;
       block += static_cast<int32_t>(blockDim.x)) {
    float x[kNvfp4Block];
    row.load(block, x);
#pragma unroll
    for (const float value : x) amax = max(amax, magnitude_bits(value));
  }
  return float_from_bits(block_maximum(amax));
}

/// expert_scales of the row's group. All threads look: one of them finds it.
__device__ float expert_scale_of(const StageParams& p, int32_t row) {
  if (p.group_offsets == nullptr) return __ldcg(p.expert_scales);
  __shared__ float found;
  for (auto group = static_cast<int32_t>(threadIdx.x); group < p.groups;
       group += static_cast<int32_t>(blockDim.x)) {
    if (p.group_offsets[group] <= row && row < p.group_offsets[group + 1]) found = p.expert_scales[group];
  }
  __syncthreads();
  const float scale = found;
  __syncthreads();
  return scale;
}

template <ActivationFormat kFormat>
__device__ float global_scale_of(const StageParams& p, const SourceRow& source, int32_t row) {
  if (kFormat == ActivationFormat::kFp8) return dynamic_scale(row_amax(source, p.blocks), kE4m3Max);
  switch (p.policy) {
    case ScalePolicy::kStatic:
    case ScalePolicy::kMaxOverExperts:
      return expert_scale_of(p, row);
    case ScalePolicy::kDynamicTensor:
      return nvfp4_global_scale(*p.tensor_amax);
    case ScalePolicy::kDynamicToken:
      return nvfp4_global_scale(row_amax(source, p.blocks));
  }
  return 1.0f;
}

template <ActivationFormat kFormat>
constexpr bool kIsNvfp4 = is_nvfp4(kFormat);

/// `sixth`: for NVFP4, sixth_of_largest(x).
template <ActivationFormat kFormat, CodesWanted kCodes>
__device__ void stage_block(const StageParams& p, float (&x)[kNvfp4Block], float sixth, float global,
                            int32_t row, int32_t index) {
  if constexpr (kFormat == ActivationFormat::kBf16) {
#pragma unroll
    for (float& value : x) value = static_cast<float>(encode_bf16(value));  // quiets a NaN
    store_exact(x, row, index, p.out.first);
    store_exact(x, row, index, p.values);
  } else if constexpr (kFormat == ActivationFormat::kFp8) {
    const float reciprocal = 1.0f / global;
#pragma unroll
    for (int i = 0; i < kNvfp4Block; ++i) {
      const uint8_t code = encode_e4m3(__fmul_rn(x[i], reciprocal));
      if (p.out.codes.data != nullptr) p.out.codes.row(row)[int64_t{index} * kNvfp4Block + i] = code;
      x[i] = decode_e4m3(code);
    }
    store_exact(x, row, index, p.out.first);
  } else {
    const RowPlace place = kCodes == CodesWanted::kStacked ? p.out.stacked.places[row] : RowPlace{};
    quantize_block<kFormat == ActivationFormat::kNvfp4x2, kCodes>(x, sixth, global, row, index, place, p.out);
  }
}

/// Blocks of threads that a multiprocessor should hold. With three, NVFP4 spills registers in the loop over a
/// token's slots; so do the others, less, which were not tried with two.
template <ActivationFormat kFormat>
constexpr int kResidentBlocks = kIsNvfp4<kFormat> ? 2 : 3;

template <ActivationFormat kFormat, CodesWanted kCodes>
__global__ void __launch_bounds__(kMostRowThreads, kResidentBlocks<kFormat>)
    stage_rows(const __grid_constant__ StageParams p) {
  begin_staging(p);
  const int32_t rows = p.group_offsets != nullptr ? p.group_offsets[p.groups] : p.rows;
  for (auto row = static_cast<int32_t>(blockIdx.x); row < rows; row += static_cast<int32_t>(gridDim.x)) {
    const SourceRow source = row_of(p.source, row);
    float global = 1.0f;
    if constexpr (kFormat != ActivationFormat::kBf16) {
      global = global_scale_of<kFormat>(p, source, row);
      if (threadIdx.x == 0) {
        if (p.row_scales != nullptr) p.row_scales[row] = global;
        if (p.tapped_row_scales != nullptr) p.tapped_row_scales[row] = global;
      }
    }
    for (auto block = static_cast<int32_t>(threadIdx.x); block < p.blocks;
         block += static_cast<int32_t>(blockDim.x)) {
      float x[kNvfp4Block];
      source.load(block, x);
      const float sixth = kIsNvfp4<kFormat> ? sixth_of_largest(x) : 0.0f;
      stage_block<kFormat, kCodes>(p, x, sixth, global, row, block);
    }
  }
  end_staging(p);
}

constexpr int kSharedSlots = 32;

/// Rows of some slots of a token, and their global scales where experts have their own.
struct SlotRows {
  int32_t row[kSharedSlots];  // -1: none
  float scale[kSharedSlots];
};

/// find_slot_rows() where rows are slots.
__device__ void take_slots(const StageParams& p, int64_t first_slot, int32_t count, SlotRows& found) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto slot = static_cast<int32_t>(first_slot) + thread;
  bool ignored = false;
  const int32_t expert = thread < count ? p.ids.expert_of<true>(slot, ignored) : -1;
  const float scale = expert >= 0 ? __ldcg(p.expert_scales + expert) : 1.0f;
  __syncthreads();  // those before have been read
  if (thread < count) {
    found.row[thread] = expert >= 0 ? slot : -1;
    found.scale[thread] = scale;
  }
  __syncthreads();
}

/// All threads take part; begins and ends with a barrier. All that is read is asked for at once, where a
/// thread has one group: with few tokens, the time of this kernel is that of its longest chain of loads.
__device__ void find_slot_rows(const StageParams& p, int64_t first_slot, int32_t count, bool scaled_by_expert,
                               SlotRows& found) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (p.by_slot) return take_slots(p, first_slot, count, found);
  const int32_t row = thread < count ? p.source.row_of_slot[first_slot + thread] : -1;
  int32_t begin = 0, end = 0;
  float scale = 1.0f;
  const auto load_group = [&](int32_t group) {
    begin = p.group_offsets[group];
    end = p.group_offsets[group + 1];
    scale = p.expert_scales[group];
  };
  if (scaled_by_expert && thread < p.groups) load_group(thread);
  __syncthreads();  // those before have been read
  if (thread < count) found.row[thread] = row;
  __syncthreads();
  if (!scaled_by_expert) return;
  for (int32_t group = thread; group < p.groups; group += static_cast<int32_t>(blockDim.x)) {
    if (group != thread) load_group(group);
    for (int32_t slot = 0; slot < count; ++slot) {
      if (begin <= found.row[slot] && found.row[slot] < end) found.scale[slot] = scale;
    }
  }
  __syncthreads();
}

/// blockIdx.x: tokens, in turn; blockIdx.y: which slots_each of a token's slots.
template <ActivationFormat kFormat, CodesWanted kCodes>
__global__ void __launch_bounds__(kMostRowThreads, kResidentBlocks<kFormat>)
    stage_tokens(const __grid_constant__ StageParams p, int32_t tokens, int32_t slots_each) {
  __shared__ SlotRows slots;
  begin_staging(p);
  const int32_t top_k = p.source.top_k, begin = static_cast<int32_t>(blockIdx.y) * slots_each;
  const int32_t end = min(begin + slots_each, top_k);
  const bool scaled_by_expert =
      kIsNvfp4<kFormat> && (p.policy == ScalePolicy::kStatic || p.policy == ScalePolicy::kMaxOverExperts);
  for (auto token = static_cast<int32_t>(blockIdx.x); token < tokens;
       token += static_cast<int32_t>(gridDim.x)) {
    const SourceRow source{p.source.rows.row(token), 1.0f, p.source.rows.aligned, false};
    float global = 1.0f;
    if (kFormat != ActivationFormat::kBf16 && !scaled_by_expert)
      global = global_scale_of<kFormat>(p, source, 0);
    for (int32_t first = begin; first < end; first += kSharedSlots) {
      const int32_t count = min(end - first, kSharedSlots);
      const auto thread = static_cast<int32_t>(threadIdx.x);
      float x[kNvfp4Block];
      if (thread < p.blocks) source.load(thread, x);
      find_slot_rows(p, int64_t{token} * top_k + first, count, scaled_by_expert, slots);
      const auto scale_of = [&](int32_t slot) { return scaled_by_expert ? slots.scale[slot] : global; };
      if (kFormat != ActivationFormat::kBf16 && thread < count && slots.row[thread] >= 0) {
        if (p.row_scales != nullptr) p.row_scales[slots.row[thread]] = scale_of(thread);
        if (p.tapped_row_scales != nullptr) p.tapped_row_scales[slots.row[thread]] = scale_of(thread);
      }
      for (int32_t block = thread; block < p.blocks; block += static_cast<int32_t>(blockDim.x)) {
        if (block != thread) source.load(block, x);
        const float sixth = kIsNvfp4<kFormat> ? sixth_of_largest(x) : 0.0f;
        for (int32_t slot = 0; slot < count; ++slot) {
          if (slots.row[slot] < 0) continue;
          float values[kNvfp4Block];
#pragma unroll
          for (int i = 0; i < kNvfp4Block; ++i) values[i] = x[i];
          stage_block<kFormat, kCodes>(p, values, sixth, scale_of(slot), slots.row[slot], block);
        }
      }
    }
  }
  end_staging(p);
}

__global__ void __launch_bounds__(kMostRowThreads)
    amax_of_rows(const __grid_constant__ Source source, const int32_t* group_offsets, int32_t groups,
                 int32_t blocks, uint32_t* amax_bits) {
  start_after_previous();
  const int32_t rows = group_offsets[groups];
  uint32_t amax = 0;
  for (auto row = static_cast<int32_t>(blockIdx.x); row < rows; row += static_cast<int32_t>(gridDim.x)) {
    amax = max(amax, float_bits(row_amax(row_of(source, row), blocks)));
  }
  if (threadIdx.x == 0 && amax != 0) atomicMax(amax_bits, amax);
}

Source source_of(const RowSource& source, int64_t max_rows) {
  if (source.rows.cols % kNvfp4Block != 0) reject("stage: columns", "a multiple of 16", source.rows.cols);
  if (max_rows > kMostRows) reject("stage: rows", "at most 2^30", max_rows);
  return {Rows<const Bf16>(source.rows),      source.slot_of_row,  source.row_of_slot,
          static_cast<int32_t>(source.top_k), source.weights.data, source.weights.stride};
}

StageParams params_of(const StageArgs& args) {
  const StagedActivations& staged = args.staged;
  StageParams p{};
  p.source = source_of(args.source, args.max_rows);
  p.group_offsets = args.group_offsets.data();
  p.groups = static_cast<int32_t>(args.group_offsets.size()) - 1;
  p.by_slot = args.by_slot_of_experts > 0;
  if (p.by_slot) p.ids = ExpertIds(*args.source.routing, args.by_slot_of_experts);
  p.beside_previous = args.beside_previous;
  p.cleared = args.cleared.data();
  p.cleared_words = static_cast<int32_t>(args.cleared.size());
  p.rows = static_cast<int32_t>(args.source.rows.rows);
  p.blocks = static_cast<int32_t>(args.source.rows.cols / kNvfp4Block);
  p.policy = args.policy;
  p.expert_scales = args.expert_scales;
  p.tensor_amax = args.tensor_amax;
  p.out = {Rows<Bf16>(args.decoded.first),
           Rows<Bf16>(args.decoded.second),
           Rows<uint8_t>(staged.codes),
           Rows<uint8_t>(staged.scales),
           Rows<uint8_t>(staged.residual_codes),
           Rows<uint8_t>(staged.residual_scales),
           args.stacked};
  p.row_scales = args.decoded.row_scales;
  p.values = Rows<Bf16>(staged.values);
  p.tapped_row_scales = staged.row_scales.data();
  return p;
}

}  // namespace

void stage(const StageArgs& args, void* stream) {
  const int64_t cols = args.source.rows.cols;
  if (args.max_rows == 0 || cols == 0) return;
  const bool by_slot = args.by_slot_of_experts > 0;
  const bool by_token = by_slot || (args.source.row_of_slot != nullptr && args.source.weights.empty());
  if (args.group_offsets.empty() && !by_slot && args.source.slot_of_row != nullptr) {
    throw Error(ErrorCode::kInvalidArgument,
                "stage: group_offsets: expected [E + 1] beside slot_of_row, found none");
  }
  if (by_slot && (args.source.routing == nullptr || args.expert_scales == nullptr)) {
    throw Error(ErrorCode::kInvalidArgument,
                "stage: by_slot_of_experts: expected source.routing and expert_scales beside it, found none");
  }
  const StageParams params = params_of(args);
  const auto launch = [&]<ActivationFormat kFormat, CodesWanted kCodes> {
    if (!by_token) {
      return launch_after_previous("stage_rows", stage_rows<kFormat, kCodes>, row_blocks(args.max_rows, cols),
                                   row_threads(cols), 0, stream, params);
    }
    // Few tokens: several blocks of threads share one.
    const int64_t tokens = args.source.rows.rows, top_k = args.source.top_k;
    const unsigned blocks = row_blocks(tokens, cols);
    const int64_t sharing = std::clamp<int64_t>(row_blocks(args.max_rows, cols) / blocks, 1, top_k);
    const int64_t slots_each = (top_k + sharing - 1) / sharing;
    const dim3 grid(blocks, static_cast<unsigned>((top_k + slots_each - 1) / slots_each));
    launch_after_previous("stage_tokens", stage_tokens<kFormat, kCodes>, grid, row_threads(cols), 0, stream,
                          params, static_cast<int32_t>(tokens), static_cast<int32_t>(slots_each));
  };
  const auto launch_nvfp4 = [&]<ActivationFormat kFormat> {
    if (args.stacked.codes != nullptr) return launch.template operator()<kFormat, CodesWanted::kStacked>();
    const StagedActivations& taps = args.staged;
    const bool tapped = !taps.codes.empty() || !taps.scales.empty() || !taps.residual_codes.empty() ||
                        !taps.residual_scales.empty();
    if (tapped) return launch.template operator()<kFormat, CodesWanted::kTapped>();
    launch.template operator()<kFormat, CodesWanted::kNone>();
  };
  switch (args.format) {
    case ActivationFormat::kNvfp4:
      return launch_nvfp4.template operator()<ActivationFormat::kNvfp4>();
    case ActivationFormat::kNvfp4x2:
      return launch_nvfp4.template operator()<ActivationFormat::kNvfp4x2>();
    case ActivationFormat::kFp8:  // whose codes are written where they are tapped, by the same kernel
      return launch.template operator()<ActivationFormat::kFp8, CodesWanted::kNone>();
    case ActivationFormat::kBf16:
      return launch.template operator()<ActivationFormat::kBf16, CodesWanted::kNone>();
  }
}

void find_amax(const RowSource& source, std::span<const int32_t> group_offsets, int64_t max_rows, float* amax,
               void* stream) {
  if (max_rows == 0 || source.rows.cols == 0) return;
  launch_after_previous("amax_of_rows", amax_of_rows, row_blocks(max_rows, source.rows.cols),
                        row_threads(source.rows.cols), 0, stream, source_of(source, max_rows),
                        group_offsets.data(), static_cast<int32_t>(group_offsets.size()) - 1,
                        static_cast<int32_t>(source.rows.cols / kNvfp4Block),
                        reinterpret_cast<uint32_t*>(amax));
}

}  // namespace fourfold::cuda
