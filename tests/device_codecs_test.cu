// Codecs and the block quantizer give the same bits on the device as on the host. Exit code 77: no device
// here.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "fourfold/number_formats.h"
#include "numeric/block_quantizer.h"

namespace fourfold {
namespace {

constexpr int kSkipped = 77;
constexpr int kBlocks = 1 << 16;

struct Encoded {
  uint16_t bf16;
  uint8_t e2m1, e4m3;
};

struct Decoded {
  float e2m1, e4m3, e8m0, f16;
};

struct QuantizedBlock {
  uint8_t codes[8];
  uint8_t scale;
};

FOURFOLD_HOST_DEVICE Encoded encode(float value) {
  return {encode_bf16(value).bits, encode_e2m1(value), encode_e4m3(value)};
}

FOURFOLD_HOST_DEVICE Decoded decode(uint32_t code) {
  const auto byte = static_cast<uint8_t>(code);
  return {decode_e2m1(byte), decode_e4m3(byte), decode_e8m0(byte), decode_f16(static_cast<uint16_t>(code))};
}

/// Sixteen floats that cover all exponents: bits of a multiplicative hash, magnitudes near each other in a
/// block.
FOURFOLD_HOST_DEVICE QuantizedBlock quantize(uint32_t block) {
  float x[16];
  for (uint32_t i = 0; i < 16; ++i) {
    const uint32_t hash = (block * 16 + i) * 2654435761u;
    const uint32_t exponent = (block % 250) + (hash & 3);
    x[i] = float_from_bits((hash & 0x807FFFFFu) | (exponent << 23));
  }
  const float global = float_from_bits(((block >> 8) % 250) << 23 | (block * 40503u & 0x7FFFFFu));
  QuantizedBlock result{};
  result.scale = quantize_nvfp4_block(x, global, block % 2 == 0, result.codes);
  return result;
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
    out[i] = encode(probe(i));
  }
}

__global__ void decode_all(Decoded* out) {
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < 65536; i += gridDim.x * blockDim.x)
    out[i] = decode(i);
}

__global__ void quantize_all(QuantizedBlock* out) {
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < kBlocks; i += gridDim.x * blockDim.x) {
    out[i] = quantize(i);
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

int run() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device on this machine\n");
    return kSkipped;
  }
  const bool encoded =
      same_on_device<Encoded>("encode", encode_all, kProbes, [](uint32_t i, const Encoded& found) {
        const Encoded expected = encode(probe(i));
        return expected.bf16 == found.bf16 && expected.e2m1 == found.e2m1 && expected.e4m3 == found.e4m3;
      });
  const bool decoded =
      same_on_device<Decoded>("decode", decode_all, 65536, [](uint32_t i, const Decoded& found) {
        const Decoded expected = decode(i);
        return same_bits(expected.e2m1, found.e2m1) && same_bits(expected.e4m3, found.e4m3) &&
               same_bits(expected.e8m0, found.e8m0) && same_bits(expected.f16, found.f16);
      });
  const bool quantized = same_on_device<QuantizedBlock>(
      "quantize", quantize_all, kBlocks, [](uint32_t i, const QuantizedBlock& found) {
        const QuantizedBlock expected = quantize(i);
        return expected.scale == found.scale && std::memcmp(expected.codes, found.codes, 8) == 0;
      });
  return encoded && decoded && quantized ? 0 : 1;
}

}  // namespace
}  // namespace fourfold

int main() {
  return fourfold::run();
}
