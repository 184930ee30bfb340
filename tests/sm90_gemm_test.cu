// The grouped GEMM of src/sm90 against float64 from the checkpoint's form of the weights, which shares
// nothing with the packed form. Random data in every run (the seed is printed). Exit code 77: no device here.
//
//   sm90_gemm_test [SEED [small|forced]]
// small: no large matrices, for sanitizers; forced: nor many experts, nor every depth twice
//
// Tolerances, relative L2 over all outputs of a case:
//   bf16: a rounding to 8 bits is off by at most 2^-9 relatively and by 2^-9 / sqrt(3) = 1.1e-3 in the mean
//         square; where the value before it differs in the last bits of float32, few roundings flip. 3e-3.
//   float32: products are exact, so only the accumulation of K terms in float32 is left, each addition off by
//         at most 2^-23 of a partial sum; over K <= 4096 terms of random sign about sqrt(K) 2^-24 = 4e-6.
//         1e-5.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "fourfold/number_formats.h"
#include "sm90/expert_gemm.h"

namespace fourfold::sm90 {
namespace {

constexpr int kSkipped = 77;
constexpr double kBf16Tolerance = 3e-3, kFloat32Tolerance = 1e-5;
constexpr uint8_t kPoison = 0xFF;  // NaN in both output types

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count = 0) : count_(count) {
    if (count > 0) check(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc");
    poison();
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { set(values); }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  void set(const std::vector<T>& values) {
    check(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "set");
  }
  std::vector<T> get() const {
    std::vector<T> values(count_);
    check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "get");
    return values;
  }
  void poison() {
    if (count_ > 0) check(cudaMemset(data_, kPoison, count_ * sizeof(T)), "poison");
  }
  T* data() const { return data_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  size_t count_ = 0;
  T* data_ = nullptr;
};

__device__ __host__ inline uint32_t hash(uint64_t x) {
  x = (x ^ (x >> 31)) * 0x7FB5D329728EA185ull;
  x = (x ^ (x >> 27)) * 0x81DADEF4BC2DD44Dull;
  return static_cast<uint32_t>(x ^ (x >> 33));
}

/// Codes of any value; scales of every kind: mostly of middling size, some zero, subnormal or negative.
__global__ void fill_weights(uint8_t* codes, int64_t code_bytes, uint8_t* scales, int64_t scale_bytes,
                             uint64_t seed) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x,
                first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < code_bytes; i += step) codes[i] = static_cast<uint8_t>(hash(seed + i));
  for (int64_t i = first; i < scale_bytes; i += step) {
    const uint32_t random = hash(~seed - i), kind = random >> 24;
    const uint32_t scale = kind < 8 ? 0 : kind < 16 ? random & 7u : 0x20u + (random & 0x1Fu);
    scales[i] = static_cast<uint8_t>(scale | (kind > 250 ? 0x80u : 0u));
  }
}

/// Values in (-1, 1) times `size`, of any low bits.
__global__ void fill_tokens(Bf16* tokens, int64_t count, float size, uint64_t seed) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    tokens[i] = encode_bf16(size * (static_cast<float>(hash(seed + i)) * 4.656612873e-10f - 1.0f));
  }
}

struct Case {
  std::string name;
  std::vector<int> groups;  // rows of each expert
  int64_t max_rows;         // decides the kernel, too, unless one is named
  PackedShape shape;
  int terms = 1;
  bool row_scales = false, bias = false, float32 = false, swizzled = false, padded_strides = false;
  std::optional<ActivationFunction> activation;
  std::optional<GemmKernel> kernel;
  std::optional<int> launches;  // that the plan must have
};

/// What the oracle reads.
struct OracleArgs {
  PackedShape shape;
  int experts, rows, terms;
  const int32_t* offsets;
  const Bf16* tokens[2];
  int64_t token_stride;
  const uint8_t* codes;   // [E, halves, channels, K/2]
  const uint8_t* scales;  // [E, halves, ...]
  int64_t scales_per_matrix;
  bool swizzled;
  const float* row_scales;
  const float* globals;
  const float* bias;
};

/// Sums over a case.
struct Verdict {
  double error = 0, reference = 0;
  unsigned long long unwritten = 0, overwritten = 0;

  double relative() const { return std::sqrt(error / reference); }
};

__device__ double exact_value(const OracleArgs& args, int row, int half, int64_t channel) {
  int expert = 0;
  while (args.offsets[expert + 1] <= row) ++expert;
  const int64_t matrix = int64_t{expert} * args.shape.halves() + half, depth = args.shape.depth;
  const uint8_t* codes = args.codes + (matrix * args.shape.channels + channel) * (depth / 2);
  double sum = 0;
  for (int64_t block = 0; block < depth / 16; ++block) {
    const int64_t at =
        args.swizzled ? swizzled_scale_offset(channel, block, depth / 16) : channel * (depth / 16) + block;
    const double scale = decode_e4m3(args.scales[matrix * args.scales_per_matrix + at]);
    double block_sum = 0;
    for (int64_t k = block * 16; k < block * 16 + 16; ++k) {
      const uint8_t pair = codes[k / 2];
      const double weight = decode_e2m1(k % 2 == 0 ? pair & 15 : pair >> 4);
      for (int term = 0; term < args.terms; ++term) {
        block_sum +=
            weight * static_cast<double>(static_cast<float>(args.tokens[term][row * args.token_stride + k]));
      }
    }
    sum += scale * block_sum;
  }
  const float row_scale = args.row_scales != nullptr ? args.row_scales[row] : 1.0f;
  const float alpha = row_scale * args.globals[matrix];
  const double bias = args.bias != nullptr ? args.bias[matrix * args.shape.channels + channel] : 0.0f;
  return static_cast<double>(alpha) * sum + bias;
}

__device__ void judge(Verdict* verdict, double found, double expected) {
  atomicAdd(&verdict->error, (found - expected) * (found - expected));
  atomicAdd(&verdict->reference, expected * expected);
}

/// An output matrix as the test holds it.
struct Output {
  const void* data;
  int64_t stride, allocated_rows;
  bool float32;

  __device__ double at(int64_t row, int64_t col) const {
    return float32 ? static_cast<const float*>(data)[row * stride + col]
                   : static_cast<float>(static_cast<const Bf16*>(data)[row * stride + col]);
  }
  __device__ bool poisoned(int64_t row, int64_t col) const {
    return float32 ? static_cast<const uint32_t*>(data)[row * stride + col] == 0xFFFFFFFFu
                   : static_cast<const uint16_t*>(data)[row * stride + col] == 0xFFFFu;
  }
};

__device__ bool judge_poison(const Output& output, int64_t row, int64_t col, bool should_be_written,
                             Verdict* verdict) {
  const bool poisoned = output.poisoned(row, col);
  if (should_be_written && poisoned) atomicAdd(&verdict->unwritten, 1ull);
  if (!should_be_written && !poisoned) atomicAdd(&verdict->overwritten, 1ull);
  return should_be_written && !poisoned;
}

/// Every element of `output`: columns of all halves where it is h. Large outputs: every `sparse`-th.
__global__ void judge_gemm(OracleArgs args, Output output, int halves, int64_t sparse, Verdict* verdict) {
  const int64_t columns = output.stride;
  const int64_t count = output.allocated_rows * columns, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count / sparse; i += step) {
    const int64_t element = i * sparse + hash(i) % sparse, row = element / columns, col = element % columns;
    const bool there = row < args.rows && col < halves * args.shape.channels;
    if (!judge_poison(output, row, col, there, verdict)) continue;
    judge(verdict, output.at(row, col),
          exact_value(args, static_cast<int>(row), static_cast<int>(col / args.shape.channels),
                      col % args.shape.channels));
  }
}

__device__ double sigmoid(double x) {
  return 1.0 / (1.0 + exp(-x));
}

__device__ double exact_activation(const ActivationFunction& f, double gate, double up) {
  const double limit = f.limit;
  const double clamped_up = up < -limit ? -limit : up > limit ? limit : up;
  switch (f.kind) {
    case ActivationKind::kSwiglu: {
      const double g = gate > limit ? limit : gate;
      return g * sigmoid(f.alpha * g) * (clamped_up + f.beta);
    }
    case ActivationKind::kSwigluStep: {
      const double s = gate * sigmoid(gate);
      return (s > limit ? limit : s) * clamped_up;
    }
    case ActivationKind::kGeglu:
      return 0.5 * gate * erfc(-gate * 0.70710678118654752) * up;
    case ActivationKind::kGegluTanh:
      return gate * sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up;
    case ActivationKind::kReluSquared:
      return up < 0 ? 0 : up * up;
    case ActivationKind::kSilu:
      return up * sigmoid(up);
    case ActivationKind::kGelu:
      return 0.5 * up * erfc(-up * 0.70710678118654752);
  }
  return 0;
}

/// The activation judged on the kernel's own h.
__global__ void judge_activation(ActivationFunction f, bool gated, int rows, int64_t channels, Output h,
                                 Output d, Verdict* verdict) {
  const int64_t count = d.allocated_rows * d.stride, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t row = i / d.stride, col = i % d.stride;
    if (!judge_poison(d, row, col, row < rows && col < channels, verdict)) continue;
    judge(verdict, d.at(row, col),
          exact_activation(f, gated ? h.at(row, col) : 0.0, h.at(row, gated ? channels + col : col)));
  }
}

/// A case's operands and results on the device.
class Bench {
 public:
  Bench(const Case& c, uint64_t seed)
      : case_(c),
        experts_(static_cast<int>(c.groups.size())),
        rows_(std::accumulate(c.groups.begin(), c.groups.end(), 0)),
        token_stride_(c.shape.depth + (c.padded_strides ? 24 : 0)),
        d_stride_(c.shape.channels + (c.padded_strides ? 40 : 0)),
        h_stride_(c.shape.rows() + (c.padded_strides ? 8 : 0)),
        scales_per_matrix_(c.swizzled ? swizzled_scale_bytes(c.shape.channels, c.shape.depth / 16)
                                      : c.shape.channels * (c.shape.depth / 16)),
        offsets_(offsets_of(c.groups)),
        first_(static_cast<size_t>(c.max_rows * token_stride_)),
        second_(c.terms == 2 ? static_cast<size_t>(c.max_rows * token_stride_) : 0),
        codes_(static_cast<size_t>(matrices() * c.shape.channels * c.shape.depth / 2)),
        scales_(static_cast<size_t>(matrices() * scales_per_matrix_)),
        packed_(static_cast<size_t>(experts_ * c.shape.bytes())),
        row_scales_(random_floats(c.max_rows, seed + 1)),
        globals_(random_floats(matrices(), seed + 2)),
        bias_(random_floats(matrices() * c.shape.channels, seed + 3)),
        d_(static_cast<size_t>(c.max_rows * d_stride_ * (c.float32 ? 2 : 1))),
        h_(c.activation ? static_cast<size_t>(c.max_rows * h_stride_) : 0),
        verdict_(1),
        tickets_(kGemmTickets) {
    new_tokens(seed);
    fill_weights<<<1024, 256>>>(codes_.data(), static_cast<int64_t>(codes_.bytes()), scales_.data(),
                                static_cast<int64_t>(scales_.bytes()), seed + 6);
    pack();
  }

  /// Rows beyond M hold NaN: they must not matter.
  void new_tokens(uint64_t seed) {
    first_.poison();
    second_.poison();
    fill_tokens<<<1024, 256>>>(first_.data(), rows_ * token_stride_, 1.0f, seed + 4);
    if (case_.terms == 2) fill_tokens<<<1024, 256>>>(second_.data(), rows_ * token_stride_, 0.1f, seed + 5);
  }

  void new_groups(const std::vector<int>& groups) {
    offsets_.set(offsets_of(groups));
    rows_ = std::accumulate(groups.begin(), groups.end(), 0);
  }

  void pack() {
    packed_.poison();
    for (int e = 0; e < experts_; ++e) {
      PackWeights pack;
      pack.shape = case_.shape;
      pack.matrix = matrix(e * case_.shape.halves());
      if (case_.shape.halves() == 2) pack.up = matrix(e * 2 + 1);
      pack.packed = reinterpret_cast<std::byte*>(packed_.data()) + e * case_.shape.bytes();
      launch_pack_weights(pack, nullptr);
    }
  }

  ExpertGemm gemm(bool tap) {
    ExpertGemm args;
    args.experts = experts_;
    args.max_rows = case_.max_rows;
    args.kernel = case_.kernel;
    args.tokens[0] = {first_.data(), case_.max_rows, case_.shape.depth, token_stride_};
    if (case_.terms == 2) args.tokens[1] = {second_.data(), case_.max_rows, case_.shape.depth, token_stride_};
    if (case_.row_scales) args.row_scales = row_scales_.data();
    args.group_offsets = offsets_.data();
    args.weights = case_.shape;
    args.packed = reinterpret_cast<const std::byte*>(packed_.data());
    args.weight_globals = globals_.data();
    if (case_.bias) args.bias = bias_.data();
    if (case_.float32) {
      args.d = MatrixView<float>{reinterpret_cast<float*>(d_.data()), case_.max_rows, case_.shape.channels,
                                 d_stride_};
    } else {
      args.d = MatrixView<Bf16>{d_.data(), case_.max_rows, case_.shape.channels, d_stride_};
    }
    args.activation = case_.activation;
    if (tap) args.h = {h_.data(), case_.max_rows, case_.shape.rows(), h_stride_};
    if (const size_t bytes = workspace_bytes(args); bytes > 0) {
      if (workspace_ == nullptr) check(cudaMalloc(&workspace_, bytes), "workspace");
      args.workspace = {static_cast<std::byte*>(workspace_), bytes};
    }
    return args;
  }
  ~Bench() { cudaFree(workspace_); }

  /// The same product, but tiles are taken by ticket.
  ExpertGemm by_ticket(ExpertGemm args) {
    check(cudaMemset(tickets_.data(), 0, tickets_.bytes()), "tickets");
    args.tickets = tickets_.data();
    return args;
  }

  /// The same product, but the kernel gathers its rows: they lie shuffled, among rows of NaN, and their slots
  /// are where they lie, of top-3. Slots beyond M point nowhere.
  ExpertGemm gathering_gemm(uint64_t seed) {
    constexpr int64_t kTopK = 3;
    const int64_t tokens = 2 * case_.max_rows;
    std::vector<int32_t> places(static_cast<size_t>(tokens));
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), std::mt19937_64(seed));
    const std::vector<Bf16> sorted = first_.get();
    const std::vector<float> sorted_scales = row_scales_.get();
    std::vector<Bf16> shuffled(static_cast<size_t>(tokens * token_stride_), Bf16{0xFFFF});
    std::vector<float> shuffled_scales(static_cast<size_t>(tokens), NAN);
    std::vector<int32_t> slots(static_cast<size_t>(case_.max_rows), -1);
    for (int row = 0; row < rows_; ++row) {
      const int64_t place = places[static_cast<size_t>(row)];
      std::copy_n(sorted.begin() + row * token_stride_, case_.shape.depth,
                  shuffled.begin() + place * token_stride_);
      shuffled_scales[static_cast<size_t>(place)] = sorted_scales[static_cast<size_t>(row)];
      slots[static_cast<size_t>(row)] = static_cast<int32_t>(place * kTopK + row % kTopK);
    }
    shuffled_.emplace(shuffled);
    shuffled_scales_.emplace(shuffled_scales);
    slots_.emplace(slots);
    ExpertGemm args = gemm(false);
    args.tokens[0] = {shuffled_->data(), tokens, case_.shape.depth, token_stride_};
    if (case_.row_scales) args.row_scales = shuffled_scales_->data();
    args.slot_of_row = slots_->data();
    args.top_k = kTopK;
    return args;
  }

  void poison() {
    d_.poison();
    h_.poison();
  }

  Verdict judge_sums(bool h) {
    start_verdict();
    const Output output = h ? h_output() : d_output();
    const int64_t elements = output.allocated_rows * output.stride;
    const int64_t sparse = std::max<int64_t>(1, elements * case_.shape.depth / 20'000'000'000);
    judge_gemm<<<4096, 128>>>(oracle(), output, h ? static_cast<int>(case_.shape.halves()) : 1, sparse,
                              verdict_.data());
    return verdict();
  }
  Verdict judge_activations() {
    start_verdict();
    judge_activation<<<4096, 128>>>(*case_.activation, case_.shape.halves() == 2, rows_, case_.shape.channels,
                                    h_output(), d_output(), verdict_.data());
    return verdict();
  }

  std::vector<Bf16> result() const { return d_.get(); }
  MatrixView<const Bf16> rows_written() const {
    return {d_.data(), case_.max_rows, case_.shape.channels, d_stride_};
  }
  uint8_t* scales() const { return scales_.data(); }
  int rows() const { return rows_; }

 private:
  static std::vector<int32_t> offsets_of(const std::vector<int>& groups) {
    std::vector<int32_t> offsets(groups.size() + 1);
    std::partial_sum(groups.begin(), groups.end(), offsets.begin() + 1);
    return offsets;
  }
  static std::vector<float> random_floats(int64_t count, uint64_t seed) {
    std::vector<float> values(static_cast<size_t>(count));
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = 0.02f + static_cast<float>(hash(seed * 977 + i) % 1000) * 1e-4f;
    }
    return values;
  }
  int64_t matrices() const { return experts_ * case_.shape.halves(); }

  BlockScaledView matrix(int64_t index) const {
    BlockScaledView view;
    view.rows = case_.shape.channels;
    view.cols = case_.shape.depth;
    view.codes = {codes_.data() + index * view.rows * view.cols / 2, view.rows, view.cols / 2};
    view.scales = scales_.data() + index * scales_per_matrix_;
    view.scale_stride = view.cols / 16;
    view.scale_layout = case_.swizzled ? ScaleLayout::kSwizzled128x4 : ScaleLayout::kRowMajor;
    return view;
  }
  OracleArgs oracle() const {
    return {case_.shape,     experts_,
            rows_,           case_.terms,
            offsets_.data(), {first_.data(), second_.data()},
            token_stride_,   codes_.data(),
            scales_.data(),  scales_per_matrix_,
            case_.swizzled,  case_.row_scales ? row_scales_.data() : nullptr,
            globals_.data(), case_.bias ? bias_.data() : nullptr};
  }
  Output d_output() const { return {d_.data(), d_stride_, case_.max_rows, case_.float32}; }
  Output h_output() const { return {h_.data(), h_stride_, case_.max_rows, false}; }
  void start_verdict() { check(cudaMemset(verdict_.data(), 0, sizeof(Verdict)), "verdict"); }
  Verdict verdict() { return verdict_.get()[0]; }

  Case case_;
  int experts_, rows_;
  int64_t token_stride_, d_stride_, h_stride_, scales_per_matrix_;
  DeviceArray<int32_t> offsets_;
  DeviceArray<Bf16> first_, second_;
  DeviceArray<uint8_t> codes_, scales_, packed_;
  DeviceArray<float> row_scales_, globals_, bias_;
  DeviceArray<Bf16> d_, h_;
  DeviceArray<Verdict> verdict_;
  DeviceArray<int32_t> tickets_;
  std::optional<DeviceArray<Bf16>> shuffled_;
  std::optional<DeviceArray<float>> shuffled_scales_;
  std::optional<DeviceArray<int32_t>> slots_;
  void* workspace_ = nullptr;
};

bool same_bits(const std::vector<Bf16>& a, const std::vector<Bf16>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Bf16)) == 0;
}

bool within(const Verdict& verdict, double tolerance, bool empty) {
  return verdict.unwritten == 0 && verdict.overwritten == 0 && (empty || verdict.relative() <= tolerance);
}

bool run_case(const Case& c, uint64_t seed, int most_repeats) {
  Bench bench(c, seed);
  const bool activated = c.activation.has_value();
  const GemmPlan plan = plan_gemm(c.max_rows, static_cast<int64_t>(c.groups.size()), c.shape.row_blocks());
  bench.poison();
  launch_expert_gemm(bench.gemm(activated), nullptr);
  check(cudaDeviceSynchronize(), c.name.c_str());
  const Verdict sums = bench.judge_sums(activated);
  const Verdict activations = activated ? bench.judge_activations() : Verdict{};
  const bool empty = bench.rows() == 0;
  bool right = within(sums, c.float32 ? kFloat32Tolerance : kBf16Tolerance, empty) &&
               (!activated || within(activations, kBf16Tolerance, empty)) &&
               (!c.launches || *c.launches == plan.count);
  // Without the tap, by ticket or in turn, and again and again: the same bits.
  int repeats = 0;
  bool gathered = false;
  if (c.max_rows * c.shape.channels < 20'000'000) {
    const std::vector<Bf16> first = bench.result();
    for (; repeats < most_repeats; ++repeats) {
      bench.poison();
      launch_expert_gemm(repeats % 2 == 0 ? bench.by_ticket(bench.gemm(false)) : bench.gemm(false), nullptr);
      if (!same_bits(first, bench.result())) {
        right = false;
        break;
      }
    }
    // Rows that the kernel gathers: the same bits.
    if (can_gather(bench.gemm(false))) {
      const ExpertGemm gathering = bench.gathering_gemm(seed);
      for (int i = 0; i < most_repeats; ++i) {
        bench.poison();
        launch_expert_gemm(i % 2 == 0 ? bench.by_ticket(gathering) : gathering, nullptr);
        right &= same_bits(first, bench.result());
      }
      gathered = true;
    }
    // Every kernel but kFew: the same bits, so that neither max_rows nor the plan changes them.
    const bool few = plan.main().kernel == GemmKernel::kFew;
    if (most_repeats > 1 && (c.kernel ? *c.kernel != GemmKernel::kFew : !few)) {
      for (const GemmKernelShape& other : kGemmKernels) {
        if (other.kernel == GemmKernel::kFew) continue;
        ExpertGemm args = bench.gemm(false);
        args.kernel = other.kernel;
        bench.poison();
        launch_expert_gemm(args, nullptr);
        right &= same_bits(first, bench.result());
      }
    }
  }
  std::printf("%-4s %-44s rows %6d  rel. L2 %.2e", right ? "ok" : "FAIL", c.name.c_str(), bench.rows(),
              empty ? 0.0 : sums.relative());
  if (activated) std::printf(", activation %.2e", empty ? 0.0 : activations.relative());
  if (sums.unwritten + sums.overwritten + activations.unwritten + activations.overwritten > 0) {
    std::printf(", unwritten %llu + %llu, overwritten %llu + %llu", sums.unwritten, activations.unwritten,
                sums.overwritten, activations.overwritten);
  }
  const std::string kernels = describe_kernel(bench.gemm(false));
  const size_t other = kernels.find('[');
  std::printf(", %d repeats%s, %s %s\n", repeats, gathered ? " twice, the others gathering" : "",
              kernels.substr(5, 6).c_str(), other == std::string::npos ? "" : kernels.substr(other).c_str());
  std::fflush(stdout);
  return right;
}

/// Sizes of groups: some empty, some of one row, the rest around `mean`.
std::vector<int> ragged(int experts, int mean, uint64_t seed) {
  std::vector<int> groups;
  for (int e = 0; e < experts; ++e) {
    const uint32_t random = hash(seed + static_cast<uint64_t>(e));
    groups.push_back(random % 8 == 0 ? 0 : random % 8 == 1 ? 1 : static_cast<int>(random % (2 * mean + 1)));
  }
  return groups;
}

int64_t sum(const std::vector<int>& groups) {
  return std::accumulate(groups.begin(), groups.end(), int64_t{0});
}

ActivationFunction function(ActivationKind kind, float alpha = 1, float beta = 0, float limit = INFINITY) {
  return {kind, alpha, beta, limit};
}

std::vector<Case> all_cases(uint64_t seed) {
  constexpr auto kPlain = RowOrder::kPlain, kPaired = RowOrder::kGateUpPaired;
  std::vector<Case> cases;
  // Every kernel, one and two terms, plain and SwiGLU. max_rows may be above the rows.
  for (const auto& [kernel, rows_per_expert] : {std::pair{GemmKernel::kFew, 3},
                                                {GemmKernel::kNarrow, 8},
                                                {GemmKernel::kMedium, 30},
                                                {GemmKernel::kBroad, 60},
                                                {GemmKernel::kWide, 200}}) {
    const size_t first_case = cases.size();
    for (const int terms : {1, 2}) {
      const std::string suffix = terms == 2 ? ", two terms" : "";
      const auto groups = ragged(9, 100, seed + static_cast<uint64_t>(rows_per_expert));
      const auto small = ragged(9, 7, seed);
      const int64_t bound = 9 * rows_per_expert;
      const std::vector<int> skewed = {0, 19, 1, 0, 0, 5, 0, 2, 0};  // several tiles where tokens are few
      const auto fitting = sum(groups) <= bound ? groups : sum(small) <= bound ? small : skewed;
      cases.push_back({"plain bf16" + suffix, fitting, bound, {kPlain, 320, 512}, terms, true});
      cases.push_back(
          {"plain float32" + suffix, fitting, bound, {kPlain, 320, 512}, terms, true, true, true});
      cases.push_back(
          {"odd shape" + suffix, fitting, bound, {kPlain, 336, 208}, terms, true, true, false, true, true});
      cases.push_back({"odd SwiGLU" + suffix,
                       fitting,
                       bound,
                       {kPaired, 144, 720},
                       terms,
                       true,
                       true,
                       false,
                       true,
                       true,
                       function(ActivationKind::kSwiglu, 1.702f, 1.0f, 7.0f)});
      cases.push_back({"SwiGLU" + suffix,
                       fitting,
                       bound,
                       {kPaired, 256, 1024},
                       terms,
                       false,
                       false,
                       false,
                       false,
                       false,
                       function(ActivationKind::kSwiglu)});
      cases.push_back({"all rows in one group" + suffix,
                       {0, 0, static_cast<int>(bound), 0, 0, 0, 0, 0, 0},
                       bound,
                       {kPlain, 192, 256},
                       terms,
                       true});
      cases.push_back({"one row a group" + suffix, std::vector<int>(9, 1), bound, {kPlain, 192, 256}, terms});
      cases.push_back({"no rows" + suffix, std::vector<int>(9, 0), bound, {kPlain, 192, 256}, terms});
      // Less than a unit of 64 k, and last stages with fewer units than the others; rows that are gathered,
      // too.
      for (const int64_t depth : {16, 5 * 64, 7 * 64, 10 * 64, 11 * 64}) {
        cases.push_back(
            {"K of " + std::to_string(depth) + suffix, fitting, bound, {kPlain, 16, depth}, terms});
      }
      for (const int64_t depth : {7 * 64, 9 * 64 - 16, 14 * 64}) {
        cases.push_back(
            {"SwiGLU, K of " + std::to_string(depth) + suffix, fitting, bound, {kPaired, 144, depth}, terms});
        cases.back().activation = function(ActivationKind::kSwiglu);
      }
    }
    for (size_t i = first_case; i < cases.size(); ++i) cases[i].kernel = kernel;
  }
  const auto groups = ragged(5, 20, seed + 99);
  for (const auto& [name, f] :
       {std::pair{"SwiGLU limit 10", function(ActivationKind::kSwiglu, 1, 0, 10)},
        {"SwiGLU limit 1.7, which bf16 does not hold", function(ActivationKind::kSwiglu, 1.702f, 1, 1.7f)},
        {"SwiGLU step", function(ActivationKind::kSwigluStep, 1, 0, 2)},
        {"GeGLU", function(ActivationKind::kGeglu)},
        {"GeGLU tanh", function(ActivationKind::kGegluTanh)},
        {"ReLU squared", function(ActivationKind::kReluSquared)},
        {"SiLU", function(ActivationKind::kSilu)},
        {"GELU", function(ActivationKind::kGelu)}}) {
    cases.push_back({name,
                     groups,
                     210,
                     {is_gated(f.kind) ? kPaired : kPlain, 208, 336},
                     1,
                     true,
                     true,
                     false,
                     false,
                     true,
                     f,
                     GemmKernel::kMedium});
  }
  cases.push_back({"many experts", ragged(700, 3, seed + 5), 4900, {kPlain, 64, 128}, 1, true});
  cases.push_back({"2880 x 2880, gpt-oss",
                   ragged(8, 30, seed + 7),
                   480,
                   {kPaired, 2880, 2880},
                   1,
                   true,
                   true,
                   false,
                   false,
                   false,
                   function(ActivationKind::kSwiglu, 1.702f, 1.0f, 7.0f)});
  for (const GemmKernel kernel :
       {GemmKernel::kFew, GemmKernel::kNarrow, GemmKernel::kBroad, GemmKernel::kWide}) {
    cases.push_back({"deep K", ragged(4, 100, seed + 8), 800, {kPlain, 512, 7168}, 1, true});
    cases.back().kernel = kernel;
  }
  // Every choice of the instruction.
  for (const GemmKernel kernel : {GemmKernel::kMedium, GemmKernel::kBroad, GemmKernel::kWide}) {
    for (const int terms : {1, 2}) {
      std::vector<int> groups(static_cast<size_t>(shape_of(kernel).tokens));
      std::iota(groups.begin(), groups.end(), 1);
      cases.push_back({"every number of tokens", groups, sum(groups), {kPlain, 80, 192}, terms, true});
      cases.back().kernel = kernel;
    }
  }
  // Plans of two launches: experts far from the mean, and none of them.
  const size_t first_planned = cases.size();
  for (const int mean : {8, 40, 70, 100}) {
    std::vector<int> even(670, mean), skewed = ragged(670, mean / 2, seed + static_cast<uint64_t>(mean));
    for (const size_t expert : {0, 77, 78, 669}) skewed[expert] = 3 * mean + static_cast<int>(expert) % 50;
    const int64_t bound = int64_t{670} * mean;
    const std::string name = std::to_string(mean) + " rows an expert on average";
    const int64_t channels = mean == 8 ? 480 : 272;  // two tiles of 256 rows, as many of 64 as rule kFew out
    cases.push_back({"even, " + name, even, bound, {kPlain, channels, 64}, 1, true});
    cases.push_back(
        {"uneven, " + name, skewed, bound, {kPaired, channels / 32 * 16 + 16, 128}, 1, true, true});
    cases.back().activation = function(ActivationKind::kSwiglu);
    cases.push_back({"uneven, two terms, " + name, skewed, bound, {kPlain, channels, 128}, 2});
  }
  for (size_t i = first_planned; i < cases.size(); ++i) cases[i].launches = 2;
  cases.push_back(
      {"more than 65535 tiles and 2^31 elements", {60000, 0, 1, 90000}, 150001, {kPlain, 16384, 32}, 1});
  return cases;
}

/// A NaN scale of expert 1, in gate (0) or up (1) or the only matrix (0), must show in its channel, and
/// nowhere else: clamps keep it.
bool nan_scale_shows(GemmKernel kernel, RowOrder order, int half, float limit, uint64_t seed) {
  Case c{"", {3, 2}, 16, {order, 64, 128}};
  c.kernel = kernel;
  if (order == RowOrder::kGateUpPaired) c.activation = function(ActivationKind::kSwiglu, 1, 0, limit);
  Bench bench(c, seed);
  constexpr int kChannel = 37, kBlocks = 128 / 16;
  const int matrix = c.shape.halves() + half;
  check(cudaMemset(bench.scales() + (matrix * 64 + kChannel) * kBlocks + 5, 0x7F, 1), "NaN");
  bench.pack();
  bench.poison();
  launch_expert_gemm(bench.gemm(false), nullptr);
  const std::vector<Bf16> d = bench.result();
  bool right = true;
  for (size_t row = 0; row < 5; ++row) {
    for (size_t channel = 0; channel < 64; ++channel) {
      right &= std::isnan(static_cast<float>(d[row * 64 + channel])) == (row >= 3 && channel == kChannel);
    }
  }
  return right;
}

bool nan_scales_show(uint64_t seed) {
  bool right = true;
  for (const GemmKernel kernel :
       {GemmKernel::kFew, GemmKernel::kNarrow, GemmKernel::kMedium, GemmKernel::kBroad, GemmKernel::kWide}) {
    right &= nan_scale_shows(kernel, RowOrder::kPlain, 0, INFINITY, seed);
    for (const int half : {0, 1}) {
      for (const float limit : {INFINITY, 7.0f})
        right &= nan_scale_shows(kernel, RowOrder::kGateUpPaired, half, limit, seed);
    }
  }
  std::printf("%-4s a NaN scale shows in its channel alone\n", right ? "ok" : "FAIL");
  return right;
}

/// Captured once, replayed with other tokens and groups, with and without programmatic launch: as eagerly.
/// Without a kernel: of many experts, one of them with many rows, so that a plan has two launches.
bool replays_from_a_graph(std::optional<GemmKernel> kernel, int rows_per_expert, bool overlap,
                          uint64_t seed) {
  const int experts = kernel ? 6 : 670;
  const PackedShape shape =
      kernel ? PackedShape{RowOrder::kGateUpPaired, 96, 256} : PackedShape{RowOrder::kGateUpPaired, 240, 128};
  Case c{"", std::vector<int>(static_cast<size_t>(experts), 1), experts * rows_per_expert, shape};
  c.activation = function(ActivationKind::kSwiglu);
  c.kernel = kernel;
  Bench bench(c, seed);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check(cudaStreamCreate(&stream), "stream");
  ExpertGemm args = bench.gemm(false);
  args.overlap_previous = overlap;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  launch_expert_gemm(args, stream);
  launch_expert_gemm(args, stream);
  check(cudaStreamEndCapture(stream, &graph), "end capture");
  check(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  bool right = true;
  for (uint64_t trial = 0; trial < 50 && right; ++trial) {
    std::vector<int> groups = ragged(experts, rows_per_expert / 2, seed + trial);
    if (!kernel) groups[trial % groups.size()] = 5 * rows_per_expert;
    bench.new_groups(groups);
    bench.new_tokens(seed + 100 * trial);
    bench.poison();
    launch_expert_gemm(bench.gemm(false), nullptr);
    const std::vector<Bf16> eager = bench.result();
    bench.poison();
    check(cudaDeviceSynchronize(), "poison");
    check(cudaGraphLaunch(replay, stream), "replay");
    check(cudaStreamSynchronize(stream), "replay");
    right = same_bits(eager, bench.result());
  }
  check(cudaGraphExecDestroy(replay), "destroy");
  check(cudaGraphDestroy(graph), "destroy");
  check(cudaStreamDestroy(stream), "destroy");
  std::printf("%-4s 50 replays of a graph, %d experts, %d rows an expert%s\n", right ? "ok" : "FAIL", experts,
              rows_per_expert, overlap ? ", programmatic launch" : "");
  return right;
}

/// The two GEMMs of a layer by launch_expert_gemms, from sorted and from gathered rows, captured once and
/// replayed: the bits of one after the other. The counters are cleared in the graph, as in a layer's calls.
bool gemms_agree(std::optional<GemmKernel> kernel, int experts, int rows_per_expert, int64_t hidden,
                 int64_t intermediate, int trials, uint64_t seed) {
  const int64_t bound = int64_t{experts} * rows_per_expert;
  const std::vector<int> ones(static_cast<size_t>(experts), 1);
  Case c{"", ones, bound, {RowOrder::kGateUpPaired, intermediate, hidden}};
  c.activation = function(ActivationKind::kSwiglu);
  c.kernel = kernel;
  Bench gate_up(c, seed);
  c.shape = {RowOrder::kPlain, hidden, intermediate};
  c.activation = {};
  Bench down(c, seed + 1);
  const DeviceArray<int32_t> counters(static_cast<size_t>(2 * kGemmTickets + experts));
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "stream");
  bool right = true;
  for (int trial = 0; trial < trials && right; ++trial) {
    const uint64_t trial_seed = seed + static_cast<uint64_t>(trial) * 100;
    std::vector<int> groups = ragged(experts, rows_per_expert / 2, trial_seed);
    if (!kernel) groups[static_cast<size_t>(trial % experts)] = 5 * rows_per_expert;
    gate_up.new_groups(groups);
    gate_up.new_tokens(trial_seed);
    down.new_groups(groups);
    ExpertGemm first = gate_up.gemm(false), second = down.gemm(false);
    second.tokens[0] = gate_up.rows_written();
    second.group_offsets = first.group_offsets;
    gate_up.poison();
    down.poison();
    launch_expert_gemm(first, nullptr);
    launch_expert_gemm(second, nullptr);
    const std::vector<Bf16> activation = gate_up.result(), z = down.result();
    if (trial % 2 == 1 && can_gather(first)) first = gate_up.gathering_gemm(trial_seed);
    first.tickets = counters.data();
    second.tickets = counters.data() + kGemmTickets;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    check(cudaMemsetAsync(counters.data(), 0, counters.bytes(), stream), "counters");
    launch_expert_gemms(first, second, counters.data() + 2 * kGemmTickets, stream);
    check(cudaStreamEndCapture(stream, &graph), "end capture");
    check(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
    for (int i = 0; i < 3; ++i) {
      gate_up.poison();
      down.poison();
      check(cudaDeviceSynchronize(), "poison");
      check(cudaGraphLaunch(replay, stream), "replay");
      check(cudaStreamSynchronize(stream), "replay");
      right &= same_bits(activation, gate_up.result()) && same_bits(z, down.result());
    }
    check(cudaGraphExecDestroy(replay), "destroy");
    check(cudaGraphDestroy(graph), "destroy");
  }
  check(cudaStreamDestroy(stream), "destroy");
  std::printf("%-4s both GEMMs at once, %d trials, %d experts, %d rows an expert, H %lld, I %lld: %s\n",
              right ? "ok" : "FAIL", trials, experts, rows_per_expert, static_cast<long long>(hidden),
              static_cast<long long>(intermediate),
              describe_kernel(gate_up.gemm(false)).substr(5, 6).c_str());
  std::fflush(stdout);
  return right;
}

bool all_gemms_agree(bool small, uint64_t seed) {
  bool right = true;
  for (const auto& [kernel, rows_per_expert] : {std::pair{GemmKernel::kFew, 3},
                                                {GemmKernel::kNarrow, 8},
                                                {GemmKernel::kMedium, 30},
                                                {GemmKernel::kBroad, 60},
                                                {GemmKernel::kWide, 100}}) {
    right &= gemms_agree(kernel, 6, rows_per_expert, 272, 336, small ? 2 : 10, seed);
  }
  if (small) return right;
  // So many tiles a CTA that its queue comes round, of gate/up and of down.
  right &= gemms_agree(GemmKernel::kNarrow, 670, 8, 256, 1008, 10, seed);
  right &= gemms_agree(GemmKernel::kMedium, 670, 8, 2048, 64, 10, seed);
  // Plans of two launches, alike for both GEMMs and not.
  right &= gemms_agree({}, 670, 8, 1024, 240, 10, seed);
  right &= gemms_agree({}, 670, 8, 256, 240, 10, seed);
  right &= gemms_agree({}, 670, 40, 512, 240, 4, seed);
  return right & gemms_agree({}, 670, 100, 512, 240, 4, seed);
}

int run(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device on this machine\n");
    return kSkipped;
  }
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  if (device.major != 9) {
    std::printf("skipped: %s is no Hopper GPU\n", device.name);
    return kSkipped;
  }
  const uint64_t seed =
      argc > 1 ? std::strtoull(argv[1], nullptr, 10)
               : static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
  std::printf("%s, seed %llu\n", device.name, static_cast<unsigned long long>(seed));
  bool right = nan_scales_show(seed);
  const std::string which = argc > 2 ? argv[2] : "";
  const bool forced = which == "forced", small = forced || which == "small";
  for (const Case& c : all_cases(seed)) {
    const bool depth_again = c.terms == 2 && c.name.find("K of") != std::string::npos;
    if (forced && (!c.kernel || depth_again)) continue;
    if (small && c.max_rows * c.shape.rows() * c.shape.depth > 600'000'000) continue;
    right &= run_case(c, seed, small ? 1 : 20);
  }
  for (const auto& [kernel, rows_per_expert] : {std::pair{GemmKernel::kFew, 3},
                                                {GemmKernel::kNarrow, 8},
                                                {GemmKernel::kMedium, 30},
                                                {GemmKernel::kBroad, 60},
                                                {GemmKernel::kWide, 100}}) {
    if (small) break;
    right &= replays_from_a_graph(kernel, rows_per_expert, false, seed);
    right &= replays_from_a_graph(kernel, rows_per_expert, true, seed);
  }
  for (const int rows_per_expert : {8, 100}) {
    if (small) break;
    right &= replays_from_a_graph({}, rows_per_expert, false, seed);
    right &= replays_from_a_graph({}, rows_per_expert, true, seed);
  }
  right &= all_gemms_agree(small, seed);
  std::printf("%s\n", right ? "all right" : "FAILED");
  return right ? 0 : 1;
}

}  // namespace
}  // namespace fourfold::sm90

int main(int argc, char** argv) {
  return fourfold::sm90::run(argc, argv);
}
