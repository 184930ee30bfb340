// Codecs and the block quantizer give the same bits on the device as on the host, by the GPU's conversions,
// too. Exit code 77: no device here.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/quantize_rows.cuh"
#include "fourfold/number_formats.h"
#include "numeric/block_quantizer.h"

namespace fourfold {
namespace {

constexpr int kSkipped = 77;
constexpr int kBlocks = 1 << 16;

struct Encoded {
  uint16_t bf16;
  uint8_t e2m1, e4m3;
  uint8_t converted_e4m3;  ///< by the GPU's instruction
  float rounded;           ///< to e2m1
};

struct Decoded {
  float e2m1, e4m3, e8m0, f16;
  float converted_e4m3;  ///< by the GPU's instruction
};

struct QuantizedBlock {
  uint8_t codes[8];
  uint8_t scale;
  uint32_t decoded[8];  ///< pairs of bf16; zeros have no sign
};

FOURFOLD_HOST_DEVICE Encoded encode(float value) {
  const uint8_t e2m1 = encode_e2m1(value), e4m3 = encode_e4m3(value);
  return {encode_bf16(value).bits, e2m1, e4m3, e4m3, decode_e2m1(e2m1)};
}

FOURFOLD_HOST_DEVICE Decoded decode(uint32_t code) {
  const auto byte = static_cast<uint8_t>(code);
  const float e4m3 = decode_e4m3(byte);
  return {decode_e2m1(byte), e4m3, decode_e8m0(byte), decode_f16(static_cast<uint16_t>(code)), e4m3};
}

struct Block {
  float x[kNvfp4Block];
  float global;
};

/// Sixteen floats and a global scale that cover all exponents: bits of a multiplicative hash, magnitudes near
/// each other in a block. Some have zeros, infinities or NaN, some such a global scale; some are subnormal,
/// and so nearly is the global scale: the reciprocal may be infinite where the block's scale is ordinary.
FOURFOLD_HOST_DEVICE Block block_of(uint32_t index) {
  Block block{};
  for (uint32_t i = 0; i < kNvfp4Block; ++i) {
    const uint32_t hash = (index * 16 + i) * 2654435761u;
    const uint32_t exponent = (index % 250) + (hash & 3);
    block.x[i] = float_from_bits((hash & 0x807FFFFFu) | (exponent << 23));
    if (index % 41 == 7) block.x[i] = i % 2 == 0 ? 0.0f : -0.0f;
    if (index % 31 == 3) block.x[i] = float_from_bits(hash & 0x803FFFFFu);  // subnormal
  }
  constexpr uint32_t kSpecial[7] = {0,           0x80000000u, 0x7F800000u, 0xFF800000u,
                                    0x7FC00000u, 0x00000123u, 0xBFC00000u};
  if (index % 43 == 11) block.x[index % 16] = float_from_bits(kSpecial[index % 7]);
  block.global = float_from_bits(((index >> 8) % 250) << 23 | (index * 40503u & 0x7FFFFFu));
  if (index % 31 == 3) block.global = float_from_bits((index % 9) << 23 | (index * 40503u & 0x7FFFFFu));
  if (index % 37 == 5) block.global = float_from_bits(kSpecial[index / 37 % 7]);
  return block;
}

/// Every float whose low 12 bits are 0, 1, 0x7FF, 0x800, 0x801 or 0xFFF: all exponents, all ties and their
/// neighbours.
FOURFOLD_HOST_DEVICE float probe(uint32_t index) {
  constexpr uint32_t kLow[6] = {0, 1, 0x7FF, 0x800, 0x801, 0xFFF};
  return float_from_bits((index / 6) << 12 | kLow[index % 6]);
}
constexpr uint32_t kProbes = 6u << 20;

__global__ void encode_all(Encoded* out) {
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < kProbes; i += gridDim.x * blockDim.x) {
    const float value = probe(i);
    out[i] = encode(value);
    out[i].converted_e4m3 = cuda::convert_to_e4m3(value);
    const float one[1] = {value};
    float rounded[1];
    cuda::round_block<true>(one, {0, 1.0f, 1.0f}, rounded);
    out[i].rounded = rounded[0];
  }
}

__global__ void decode_all(Decoded* out) {
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < 65536; i += gridDim.x * blockDim.x) {
    out[i] = decode(i);
    out[i].converted_e4m3 = cuda::convert_from_e4m3(static_cast<uint8_t>(i));
  }
}

__global__ void quantize_all(QuantizedBlock* out) {
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < kBlocks; i += gridDim.x * blockDim.x) {
    const Block block = block_of(i);
    const cuda::BlockScale scale = cuda::block_scale(cuda::sixth_of_largest(block.x), block.global);
    out[i].scale = scale.code;
    float rounded[kNvfp4Block], unsigned_zeros[kNvfp4Block];
    cuda::round_block<true>(block.x, scale, rounded);
    cuda::round_block<false>(block.x, scale, unsigned_zeros);
    for (int j = 0; j < kNvfp4Block; j += 2) {
      out[i].decoded[j / 2] = cuda::scale_pair(unsigned_zeros[j], unsigned_zeros[j + 1], scale.value);
    }
    for (int j = 0; j < kNvfp4Block; j += 2)
      out[i].codes[j / 2] = cuda::code_pair(rounded[j], rounded[j + 1], scale.code);
  }
}

bool check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return true;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  return false;
}

/// Runs `kernel` into `count` elements and counts those that differ from `expected`.
template <class T, class Expected>
bool same_on_device(const char* name, void (*kernel)(T*), uint32_t count, Expected expected) {
  T* device = nullptr;
  std::vector<T> found(count);
  if (!check(cudaMalloc(&device, count * sizeof(T)), "cudaMalloc")) return false;
  if (!check(cudaMemset(device, 0, count * sizeof(T)), "cudaMemset")) return false;  // padding bytes, too
  kernel<<<1024, 256>>>(device);
  if (!check(cudaGetLastError(), name)) return false;
  if (!check(cudaMemcpy(found.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost), name)) return false;
  cudaFree(device);
  uint32_t different = 0;
  for (uint32_t i = 0; i < count; ++i) different += !expected(i, found[i]);
  std::printf("%s: %u of %u differ from the host\n", name, different, count);
  return different == 0;
}

bool same_bits(float a, float b) {
  return float_bits(a) == float_bits(b) || (a != a && b != b);
}

/// The bf16 that the codes and the scale stand for, of zeros whatever sign.
bool decodes_to(const QuantizedBlock& block, const uint32_t (&pairs)[8]) {
  for (int i = 0; i < kNvfp4Block; ++i) {
    const auto code = static_cast<uint8_t>(block.codes[i / 2] >> (i % 2 * 4));
    const float expected = decode_e2m1(code & 15u) * decode_e4m3(block.scale);
    const float found = float_from_bits(i % 2 == 0 ? pairs[i / 2] << 16 : pairs[i / 2] & 0xFFFF0000u);
    if (expected == 0.0f ? found != 0.0f : !same_bits(expected, found)) return false;
  }
  return true;
}

int run() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device on this machine\n");
    return kSkipped;
  }
  const bool encoded =
      same_on_device<Encoded>("encode", encode_all, kProbes, [](uint32_t i, const Encoded& found) {
        const Encoded expected = encode(probe(i));
        return expected.bf16 == found.bf16 && expected.e2m1 == found.e2m1 && expected.e4m3 == found.e4m3 &&
               expected.converted_e4m3 == found.converted_e4m3 &&
               float_bits(expected.rounded) == float_bits(found.rounded);
      });
  const bool decoded =
      same_on_device<Decoded>("decode", decode_all, 65536, [](uint32_t i, const Decoded& found) {
        const Decoded expected = decode(i);
        return same_bits(expected.e2m1, found.e2m1) && same_bits(expected.e4m3, found.e4m3) &&
               same_bits(expected.e8m0, found.e8m0) && same_bits(expected.f16, found.f16) &&
               same_bits(expected.converted_e4m3, found.converted_e4m3);
      });
  const bool quantized = same_on_device<QuantizedBlock>(
      "quantize", quantize_all, kBlocks, [](uint32_t i, const QuantizedBlock& found) {
        const Block block = block_of(i);
        QuantizedBlock expected{};
        expected.scale = quantize_nvfp4_block(block.x, block.global, false, expected.codes);
        return expected.scale == found.scale && std::memcmp(expected.codes, found.codes, 8) == 0 &&
               decodes_to(expected, found.decoded);
      });
  return encoded && decoded && quantized ? 0 : 1;
}

}  // namespace
}  // namespace fourfold

int main() {
  return fourfold::run();
}
