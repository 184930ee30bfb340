// Times the two GEMMs of an expert layer on Hopper, the first from sorted and from gathered rows, for tuning:
// uniform random routings in rotation, weights of random bits, larger than L2 together; every figure is of a
// captured graph of calls.
//
// usage: sm90_gemm_bench [SHAPES] [TOKENS] [even], e.g. `sm90_gemm_bench AC 1,16,256`; even: all groups
// alike. The results of every case are sampled against float64 sums over the packed weights' decode on the
// host, but for the gathered rows', which sm90_gemm_test compares bit for bit.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "fourfold/number_formats.h"
#include "sm90/expert_gemm.h"
#include "sm90/packed_decode.h"

namespace fourfold::sm90 {
namespace {

constexpr double kReadBandwidth = 3.11e12, kPeakFlops = 726e12;  // measured on one H100: docs/hopper-h100.md

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
T* device_array(size_t count) {
  void* data = nullptr;
  check(cudaMalloc(&data, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(data);
}

__device__ inline uint32_t hash(uint64_t x) {
  x = (x ^ (x >> 31)) * 0x7FB5D329728EA185ull;
  x = (x ^ (x >> 27)) * 0x81DADEF4BC2DD44Dull;
  return static_cast<uint32_t>(x ^ (x >> 33));
}

/// Packed units of random codes, and scales of exponents -3 to 4 with random mantissas.
__global__ void fill_packed(uint32_t* words, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const uint32_t random = hash(i);
    const bool scale = i % (kUnitBytes / 4) >= kUnitCodeBytes / 4;
    words[i] = scale ? rotate_left((random & 0x3F3F3F3Fu) + (19u << 3) * 0x01010101u, 4) : random;
  }
}

__global__ void fill_tokens(Bf16* tokens, int64_t count, uint64_t seed) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float a = (static_cast<float>(hash(seed + 2 * i)) + 1.0f) * 2.3283064e-10f;
    const float b = static_cast<float>(hash(seed + 2 * i + 1)) * 1.4629181e-9f;
    tokens[i] = encode_bf16(sqrtf(-2.0f * logf(fminf(a, 1.0f))) * cosf(b));
  }
}

__global__ void fill_floats(float* values, int64_t count, float value) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    values[i] = value;
  }
}

struct Shape {
  char name;
  int64_t hidden, intermediate;
  int experts, top_k;
};
constexpr Shape kShapes[] = {{'A', 7168, 2048, 256, 8}, {'B', 2048, 768, 128, 8}, {'C', 4096, 2048, 256, 6}};

struct Routing {
  std::vector<int32_t> offsets;
  std::vector<int32_t> slots;  ///< of rows, expert after expert
  int touched = 0;
};

/// Every token's experts are a random choice; or, `even`, all experts get the same number of rows.
Routing draw_routing(const Shape& shape, int64_t tokens, uint64_t seed, bool even) {
  std::mt19937_64 random(seed);
  const auto experts = static_cast<size_t>(shape.experts);
  std::vector<std::vector<int32_t>> slots(experts);
  for (int32_t slot = 0; even && slot < tokens * shape.top_k; ++slot) {
    slots[static_cast<size_t>(slot) % experts].push_back(slot);
  }
  for (int64_t t = 0; t < tokens && !even; ++t) {
    std::set<int> chosen;
    while (static_cast<int>(chosen.size()) < shape.top_k) {
      chosen.insert(static_cast<int>(random() % static_cast<uint64_t>(shape.experts)));
    }
    auto slot = static_cast<int32_t>(t * shape.top_k);
    for (const int e : chosen) slots[static_cast<size_t>(e)].push_back(slot++);
  }
  Routing routing;
  routing.offsets.push_back(0);
  for (const std::vector<int32_t>& mine : slots) {
    routing.slots.insert(routing.slots.end(), mine.begin(), mine.end());
    routing.offsets.push_back(static_cast<int32_t>(routing.slots.size()));
    routing.touched += !mine.empty();
  }
  return routing;
}

/// One GEMM's operands, for a number of routings.
struct Operands {
  Shape shape;
  uint8_t* packed_gate_up;
  uint8_t* packed_down;
  float* globals;
  Bf16 *x, *activation, *z;
  std::vector<int32_t*> offsets, slots;
};

ExpertGemm gate_up(const Operands& o, int64_t rows, size_t routing, bool overlap) {
  ExpertGemm args;
  args.experts = o.shape.experts;
  args.max_rows = rows;
  args.tokens[0] = {o.x, rows, o.shape.hidden};
  args.group_offsets = o.offsets[routing];
  args.weights = {RowOrder::kGateUpPaired, o.shape.intermediate, o.shape.hidden};
  args.packed = reinterpret_cast<const std::byte*>(o.packed_gate_up);
  args.weight_globals = o.globals;
  args.d = MatrixView<Bf16>{o.activation, rows, o.shape.intermediate};
  args.activation = ActivationFunction{};
  args.overlap_previous = overlap;
  return args;
}

/// gate_up() from x itself: a row of it a token.
ExpertGemm gathered_gate_up(const Operands& o, int64_t rows, size_t routing) {
  ExpertGemm args = gate_up(o, rows, routing, false);
  args.tokens[0] = {o.x, rows / o.shape.top_k, o.shape.hidden};
  args.slot_of_row = o.slots[routing];
  args.top_k = o.shape.top_k;
  return args;
}

ExpertGemm down(const Operands& o, int64_t rows, size_t routing, bool overlap) {
  ExpertGemm args = gate_up(o, rows, routing, overlap);
  args.tokens[0] = {o.activation, rows, o.shape.intermediate};
  args.weights = {RowOrder::kPlain, o.shape.hidden, o.shape.intermediate};
  args.packed = reinterpret_cast<const std::byte*>(o.packed_down);
  args.d = MatrixView<Bf16>{o.z, rows, o.shape.hidden};
  args.activation.reset();
  return args;
}

/// Median time of one call of `enqueue(call)`, in microseconds, over replays of a graph of `calls` calls.
template <class Enqueue>
double time_calls(int calls, int replays, Enqueue enqueue) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cudaEvent_t begin, end;
  check(cudaStreamCreate(&stream), "stream");
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int call = 0; call < calls; ++call) enqueue(static_cast<size_t>(call), stream);
  check(cudaStreamEndCapture(stream, &graph), "end capture");
  check(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  std::vector<float> times;
  for (int i = 0; i < replays + 1; ++i) {
    check(cudaEventRecord(begin, stream), "record");
    check(cudaGraphLaunch(replay, stream), "launch");
    check(cudaEventRecord(end, stream), "record");
    check(cudaStreamSynchronize(stream), "run");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "elapsed");
    if (i > 0) times.push_back(ms * 1000.0f / static_cast<float>(calls));
  }
  check(cudaGraphExecDestroy(replay), "destroy");
  check(cudaGraphDestroy(graph), "destroy");
  check(cudaStreamDestroy(stream), "destroy");
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

/// Largest relative L2 error of sampled rows of z, from the activation that the first GEMM left.
double sampled_error(const Operands& o, const Routing& routing) {
  const int64_t depth = o.shape.intermediate, channels = o.shape.hidden;
  const PackedShape packed{RowOrder::kPlain, channels, depth};
  std::vector<Bf16> tokens(static_cast<size_t>(depth)), z(static_cast<size_t>(channels));
  std::vector<uint8_t> units(static_cast<size_t>(packed.depth_units() * kUnitBytes));
  double worst = 0;
  for (int sample = 0; sample < 4; ++sample) {
    const int32_t row = static_cast<int32_t>(int64_t{routing.offsets.back() - 1} * sample / 3);
    const auto expert =
        std::upper_bound(routing.offsets.begin(), routing.offsets.end(), row) - routing.offsets.begin() - 1;
    check(cudaMemcpy(tokens.data(), o.activation + row * depth, tokens.size() * 2, cudaMemcpyDeviceToHost),
          "a");
    check(cudaMemcpy(z.data(), o.z + row * channels, z.size() * 2, cudaMemcpyDeviceToHost), "z");
    const int64_t row_block = packed.row_blocks() * sample / 4;
    check(cudaMemcpy(units.data(), o.packed_down + expert * packed.bytes() + packed.unit_offset(row_block, 0),
                     units.size(), cudaMemcpyDeviceToHost),
          "w");
    double error = 0, reference = 0;
    for (int r = 0; r < kUnitRows; ++r) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const uint8_t* unit = units.data() + k / kUnitDepth * kUnitBytes;
        const int in_unit = static_cast<int>(k % kUnitDepth);
        int code = 0;
        for (int bit = 0; bit < 4; ++bit) {
          const BitPosition at = code_bit_position(r, in_unit, bit);
          code |= ((unit[at.byte] >> at.bit) & 1) << bit;
        }
        const ScalePosition at = scale_position(r, in_unit / 16);
        uint32_t word = 0;
        std::memcpy(&word, unit + at.word_byte, 4);
        const uint32_t scale = rotate_left(word, (32 - at.bit) % 32) & 0xFFu;
        sum += decode_e2m1(static_cast<uint8_t>(code)) *
               std::ldexp(1.0 + (scale & 7) / 8.0, int(scale >> 3) - 22) *
               static_cast<double>(static_cast<float>(tokens[static_cast<size_t>(k)]));
      }
      const double expected = sum * 0.01f;
      const double found = static_cast<float>(z[static_cast<size_t>(row_block * kUnitRows + r)]);
      error += (found - expected) * (found - expected);
      reference += expected * expected;
    }
    worst = std::max(worst, std::sqrt(error / reference));
  }
  return worst;
}

struct Figure {
  double us, bytes, flops;
  void print(const char* name) const {
    const double floor_us = std::max(bytes / kReadBandwidth, flops / kPeakFlops) * 1e6;
    std::printf("  %s %9.1f us %5.0f GB/s %6.1f TFLOP/s %5.1f%%", name, us, bytes / us / 1e3,
                flops / us / 1e6, 100.0 * floor_us / us);
  }
};

void run_case(const Shape& shape, Operands& o, int64_t tokens, bool even) {
  const int64_t rows = tokens * shape.top_k, h = shape.hidden, i = shape.intermediate;
  constexpr size_t kRoutings = 8;
  std::vector<Routing> routings;
  double touched = 0;
  for (size_t r = 0; r < kRoutings; ++r) {
    routings.push_back(draw_routing(shape, tokens, 1000 * static_cast<uint64_t>(tokens) + r, even));
    touched += routings[r].touched / static_cast<double>(kRoutings);
    check(cudaMemcpy(o.offsets[r], routings[r].offsets.data(), routings[r].offsets.size() * 4,
                     cudaMemcpyHostToDevice),
          "offsets");
    check(cudaMemcpy(o.slots[r], routings[r].slots.data(), routings[r].slots.size() * 4,
                     cudaMemcpyHostToDevice),
          "slots");
  }
  const int replays = tokens >= 1024 ? 3 : 7;
  const double first = time_calls(kRoutings, replays, [&](size_t call, cudaStream_t stream) {
    launch_expert_gemm(gate_up(o, rows, call, false), stream);
  });
  const double second = time_calls(kRoutings, replays, [&](size_t call, cudaStream_t stream) {
    launch_expert_gemm(down(o, rows, call, false), stream);
  });
  const auto gather = [&](size_t call, cudaStream_t stream) {
    launch_expert_gemm(gathered_gate_up(o, rows, call), stream);
  };
  const bool gathers = can_gather(gathered_gate_up(o, rows, 0));
  const double gathering = gathers ? time_calls(kRoutings, replays, gather) : 0.0;
  const double pair = time_calls(kRoutings, replays, [&](size_t call, cudaStream_t stream) {
    launch_expert_gemm(gate_up(o, rows, call, true), stream);
    launch_expert_gemm(down(o, rows, call, true), stream);
  });
  const double weight_bytes = touched * static_cast<double>(h * i) * 9 / 16;
  const auto m = static_cast<double>(rows);
  const Figure gemm1{first, 2 * weight_bytes + m * 2.0 * static_cast<double>(h + i),
                     m * 4.0 * static_cast<double>(h * i)};
  const Figure gemm2{second, weight_bytes + m * 2.0 * static_cast<double>(h + i),
                     m * 2.0 * static_cast<double>(h * i)};
  const Figure both{pair, gemm1.bytes + gemm2.bytes, gemm1.flops + gemm2.flops};
  std::printf("%c T %5lld hit %3.0f", shape.name, static_cast<long long>(tokens), touched);
  gemm1.print("gemm1");
  if (gathers) std::printf("  gathered %9.1f us", gathering);
  gemm2.print("gemm2");
  both.print("pair, overlapped");
  std::printf("  err %.1e %s\n", sampled_error(o, routings.back()),
              describe_kernel(gate_up(o, rows, 0, false)).substr(5, 6).c_str());
  std::fflush(stdout);
}

void run_shape(const Shape& shape, const std::vector<int64_t>& tokens, bool even) {
  Operands o{};
  o.shape = shape;
  const int64_t most = *std::max_element(tokens.begin(), tokens.end()) * shape.top_k;
  const int64_t gate_up_bytes =
      shape.experts * PackedShape{RowOrder::kGateUpPaired, shape.intermediate, shape.hidden}.bytes();
  const int64_t down_bytes = gate_up_bytes / 2;
  o.packed_gate_up = device_array<uint8_t>(static_cast<size_t>(gate_up_bytes));
  o.packed_down = device_array<uint8_t>(static_cast<size_t>(down_bytes));
  o.globals = device_array<float>(static_cast<size_t>(shape.experts) * 2);
  o.x = device_array<Bf16>(static_cast<size_t>(most * shape.hidden));
  o.activation = device_array<Bf16>(static_cast<size_t>(most * shape.intermediate));
  o.z = device_array<Bf16>(static_cast<size_t>(most * shape.hidden));
  for (int r = 0; r < 8; ++r) {
    o.offsets.push_back(device_array<int32_t>(static_cast<size_t>(shape.experts) + 1));
    o.slots.push_back(device_array<int32_t>(static_cast<size_t>(most)));
  }
  fill_packed<<<1056, 256>>>(reinterpret_cast<uint32_t*>(o.packed_gate_up), gate_up_bytes / 4);
  fill_packed<<<1056, 256>>>(reinterpret_cast<uint32_t*>(o.packed_down), down_bytes / 4);
  fill_floats<<<64, 256>>>(o.globals, shape.experts * 2, 0.01f);
  fill_tokens<<<1056, 256>>>(o.x, most * shape.hidden, 1);
  check(cudaDeviceSynchronize(), "fill");
  for (const int64_t t : tokens) run_case(shape, o, t, even);
  for (void* data : {static_cast<void*>(o.packed_gate_up), static_cast<void*>(o.packed_down),
                     static_cast<void*>(o.globals), static_cast<void*>(o.x), static_cast<void*>(o.activation),
                     static_cast<void*>(o.z)}) {
    cudaFree(data);
  }
  for (const auto& arrays : {o.offsets, o.slots}) {
    for (int32_t* array : arrays) cudaFree(array);
  }
}

std::vector<int64_t> parse_numbers(const std::string& text) {
  std::vector<int64_t> numbers;
  for (size_t at = 0; at < text.size(); ++at) {
    numbers.push_back(std::atoll(text.c_str() + at));
    at = std::min(text.find(',', at), text.size());
  }
  return numbers;
}

int run(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device on this machine\n");
    return 77;
  }
  const std::string shapes = argc > 1 ? argv[1] : "ABC";
  const auto tokens = parse_numbers(argc > 2 ? argv[2] : "1,4,16,64,256,1024,4096,16384");
  for (const Shape& shape : kShapes) {
    if (shapes.find(shape.name) != std::string::npos)
      run_shape(shape, tokens, argc > 3 && std::string(argv[3]) == "even");
  }
  return 0;
}

}  // namespace
}  // namespace fourfold::sm90

int main(int argc, char** argv) {
  return fourfold::sm90::run(argc, argv);
}
