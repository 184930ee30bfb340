// The PTX instructions of sm_90a that the kernels use, one wrapper each, named after it. Addresses of shared
// memory are 32-bit (shared window).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fourfold::sm90::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Barriers in shared memory.

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// Makes initialised barriers visible to the asynchronous proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Arrives, and makes the phase wait for `bytes` more from bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

/// Waits until the phase of that parity is complete.
__device__ __forceinline__ void mbarrier_wait_parity(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

/// Barriers of the CTA by number; 0 is __syncthreads'.
__device__ __forceinline__ void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Copies into shared memory.

/// L2 policy for data that is read once or in a short burst.
__device__ __forceinline__ uint64_t createpolicy_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

/// `bytes` (a multiple of 16) from global to shared memory, both 16-byte aligned.
__device__ __forceinline__ void cp_async_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                              uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], "
      "%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

/// `base` + `count`, by one instruction or two; the compiler would first add the count to whatever base is a
/// sum of.
__device__ __forceinline__ const uint4* offset_16(const uint4* base, uint32_t count) {
  const uint4* sum;
  asm("mad.wide.u32 %0, %1, 16, %2;" : "=l"(sum) : "r"(count), "l"(base));
  return sum;
}

/// 16 bytes through L2, by this thread.
__device__ __forceinline__ void cp_async_cg_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
/// The same, or 16 bytes of zeros without reading.
__device__ __forceinline__ void cp_async_cg_16_or_zero(uint32_t to, const void* from, bool reads) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(reads ? 16 : 0)
               : "memory");
}
/// What other threads' plain accesses wrote to shared memory, as their barriers let this thread see it, is
/// there for its WGMMA, too.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// What other threads' plain accesses wrote to global memory, as this thread has acquired it, is there for
/// its bulk copies, too.
__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
/// Arrives when all earlier cp.async of this thread are done; the barrier counts the thread.
__device__ __forceinline__ void cp_async_mbarrier_arrive_noinc(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/// The box of a three-dimensional tensor map that starts at (x, y, z), x counted along the contiguous axis.
__device__ __forceinline__ void cp_async_bulk_tensor_3d(uint32_t to, const CUtensorMap* map, int32_t x,
                                                        int32_t y, int32_t z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Programmatic dependent launch.

__device__ __forceinline__ void griddepcontrol_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Counters in global memory, between CTAs.

__device__ __forceinline__ int32_t ld_acquire_gpu(const int32_t* address) {
  int32_t v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}
/// Adds; what this thread has seen of other threads' writes is visible to whoever acquires the sum.
__device__ __forceinline__ void red_release_gpu_add(int32_t* address, int32_t count) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(count) : "memory");
}
/// Adds 1, and acquires, too; returns the value before.
__device__ __forceinline__ int32_t atom_acq_rel_gpu_inc(int32_t* address) {
  int32_t v;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(v) : "l"(address) : "memory");
  return v;
}

// Shared memory, arithmetic.

__device__ __forceinline__ uint4 ld_shared_v4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ uint2 ld_shared_v2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void st_shared_v4(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                             uint32_t d) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void st_shared_v2(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void st_shared_f32(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
__device__ __forceinline__ float ld_shared_f32(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ float2 ld_shared_v2_f32(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

/// Four 8x8 matrices of 16-bit elements: lane i of each eighth of the warp names row i of that matrix, and
/// lane 4g+t gets elements 2t, 2t+1 of row g of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t address, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

/// Four 8x8 matrices of 16-bit elements, transposed on the way: lane i of each eighth of the warp names the
/// 16 bytes that receive column i of that matrix.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                                  uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void stmatrix_x2_trans(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b)
               : "memory");
}
__device__ __forceinline__ void stmatrix_x1_trans(uint32_t address, uint32_t a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(a)
               : "memory");
}

/// The halves of a pair of bf16.
__device__ __forceinline__ float low_bf16(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_bf16(uint32_t pair) {
  return __uint_as_float(pair & 0xFFFF0000u);
}

/// Two floats to bf16, nearest even; `low` becomes the low half.
__device__ __forceinline__ uint32_t cvt_rn_bf16x2(float high, float low) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float min_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
/// Of both bf16 of a pair.
__device__ __forceinline__ uint32_t min_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
/// 2^x and 1/x; numbers below 2^-126 are taken and given as zero, which saves three and six instructions.
__device__ __forceinline__ float ex2_approx_ftz(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float rcp_approx_ftz(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/// The operations of sm90/packed_decode.h. Halves are taken by mov, which folds into the multiplication's
/// operands; a byte permute would stay an instruction.
struct PtxOps {
  static __device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static __device__ __forceinline__ uint32_t low_half_twice(uint32_t x) {
    uint32_t r;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {low, low};\n}" : "=r"(r) : "r"(x));
    return r;
  }
  static __device__ __forceinline__ uint32_t high_half_twice(uint32_t x) {
    uint32_t r;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {high, high};\n}" : "=r"(r) : "r"(x));
    return r;
  }
};

// Matrix multiplication by a warp: d [16, 8] += a [16, 16] . b [8, 16]^T, bf16 operands.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Warpgroup matrix multiplication.

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most kPending of the newest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Low word of the matrix descriptor of operand B: rows of 64 bf16 along k (128 bytes), 128-byte swizzle,
/// 8-row groups 1024 bytes apart, the first at a multiple of 1024. A k-step further is 32 bytes further: + 2.
__device__ __forceinline__ uint32_t matrix_descriptor_low(uint32_t address) {
  return uint32_t{1} << 16 | (address & 0x3FFFFu) >> 4;
}
/// The whole descriptor. What is added to it later is added as it is written: the compiler, which would take
/// the sum apart again, is not told where it comes from.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t low) {
  constexpr uint32_t kSwizzle128 = uint32_t{1} << 30, kGroupStride = 1024 >> 4;
  uint64_t descriptor = uint64_t{kSwizzle128 | kGroupStride} << 32 | low;
  asm("" : "+l"(descriptor));
  return descriptor;
}

/// d [64, kN] += a [64, 16] . b [kN, 16]^T; bf16 operands, a in registers; d has at
/// least kN / 2 elements, of which the first are used.
template <int kN>
struct Wgmma;

#define FOURFOLD_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define FOURFOLD_D8(i) FOURFOLD_D4(i), FOURFOLD_D4((i) + 4)
#define FOURFOLD_D16(i) FOURFOLD_D8(i), FOURFOLD_D8((i) + 8)
#define FOURFOLD_D32(i) FOURFOLD_D16(i), FOURFOLD_D16((i) + 16)
#define FOURFOLD_R4 "%0, %1, %2, %3"
#define FOURFOLD_R8 FOURFOLD_R4 ", %4, %5, %6, %7"
#define FOURFOLD_R12 FOURFOLD_R8 ", %8, %9, %10, %11"
#define FOURFOLD_R16 FOURFOLD_R12 ", %12, %13, %14, %15"
#define FOURFOLD_R20 FOURFOLD_R16 ", %16, %17, %18, %19"
#define FOURFOLD_R24 FOURFOLD_R20 ", %20, %21, %22, %23"
#define FOURFOLD_R28 FOURFOLD_R24 ", %24, %25, %26, %27"
#define FOURFOLD_R32 FOURFOLD_R28 ", %28, %29, %30, %31"
#define FOURFOLD_R36 FOURFOLD_R32 ", %32, %33, %34, %35"
#define FOURFOLD_R40 FOURFOLD_R36 ", %36, %37, %38, %39"
#define FOURFOLD_R44 FOURFOLD_R40 ", %40, %41, %42, %43"
#define FOURFOLD_R48 FOURFOLD_R44 ", %44, %45, %46, %47"
#define FOURFOLD_R52 FOURFOLD_R48 ", %48, %49, %50, %51"
#define FOURFOLD_R56 FOURFOLD_R52 ", %52, %53, %54, %55"
#define FOURFOLD_R60 FOURFOLD_R56 ", %56, %57, %58, %59"
#define FOURFOLD_R64 FOURFOLD_R60 ", %60, %61, %62, %63"
#define FOURFOLD_R68 FOURFOLD_R64 ", %64, %65, %66, %67"
#define FOURFOLD_R72 FOURFOLD_R68 ", %68, %69, %70, %71"
#define FOURFOLD_R76 FOURFOLD_R72 ", %72, %73, %74, %75"
#define FOURFOLD_R80 FOURFOLD_R76 ", %76, %77, %78, %79"

// n: columns; registers: their list; a0 to descriptor: the numbers of the operands after it; then the
// operands.
#define FOURFOLD_WGMMA(n, registers, a0, a1, a2, a3, descriptor, ...)                                   \
  template <>                                                                                           \
  struct Wgmma<n> {                                                                                     \
    template <int kSize>                                                                                \
    static __device__ __forceinline__ void mma(float (&d)[kSize], const uint32_t (&a)[4], uint64_t b) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" registers "}, {%" #a0   \
                   ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #descriptor ", 1, 1, 1, 0;"                     \
                   : __VA_ARGS__                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
    }                                                                                                   \
  };

FOURFOLD_WGMMA(8, FOURFOLD_R4, 4, 5, 6, 7, 8, FOURFOLD_D4(0))
FOURFOLD_WGMMA(16, FOURFOLD_R8, 8, 9, 10, 11, 12, FOURFOLD_D8(0))
FOURFOLD_WGMMA(24, FOURFOLD_R12, 12, 13, 14, 15, 16, FOURFOLD_D8(0), FOURFOLD_D4(8))
FOURFOLD_WGMMA(32, FOURFOLD_R16, 16, 17, 18, 19, 20, FOURFOLD_D16(0))
FOURFOLD_WGMMA(40, FOURFOLD_R20, 20, 21, 22, 23, 24, FOURFOLD_D16(0), FOURFOLD_D4(16))
FOURFOLD_WGMMA(48, FOURFOLD_R24, 24, 25, 26, 27, 28, FOURFOLD_D16(0), FOURFOLD_D8(16))
FOURFOLD_WGMMA(56, FOURFOLD_R28, 28, 29, 30, 31, 32, FOURFOLD_D16(0), FOURFOLD_D8(16), FOURFOLD_D4(24))
FOURFOLD_WGMMA(64, FOURFOLD_R32, 32, 33, 34, 35, 36, FOURFOLD_D32(0))
FOURFOLD_WGMMA(72, FOURFOLD_R36, 36, 37, 38, 39, 40, FOURFOLD_D32(0), FOURFOLD_D4(32))
FOURFOLD_WGMMA(80, FOURFOLD_R40, 40, 41, 42, 43, 44, FOURFOLD_D32(0), FOURFOLD_D8(32))
FOURFOLD_WGMMA(88, FOURFOLD_R44, 44, 45, 46, 47, 48, FOURFOLD_D32(0), FOURFOLD_D8(32), FOURFOLD_D4(40))
FOURFOLD_WGMMA(96, FOURFOLD_R48, 48, 49, 50, 51, 52, FOURFOLD_D32(0), FOURFOLD_D16(32))
FOURFOLD_WGMMA(104, FOURFOLD_R52, 52, 53, 54, 55, 56, FOURFOLD_D32(0), FOURFOLD_D16(32), FOURFOLD_D4(48))
FOURFOLD_WGMMA(112, FOURFOLD_R56, 56, 57, 58, 59, 60, FOURFOLD_D32(0), FOURFOLD_D16(32), FOURFOLD_D8(48))
FOURFOLD_WGMMA(120, FOURFOLD_R60, 60, 61, 62, 63, 64, FOURFOLD_D32(0), FOURFOLD_D16(32), FOURFOLD_D8(48),
               FOURFOLD_D4(56))
FOURFOLD_WGMMA(128, FOURFOLD_R64, 64, 65, 66, 67, 68, FOURFOLD_D32(0), FOURFOLD_D32(32))
FOURFOLD_WGMMA(136, FOURFOLD_R68, 68, 69, 70, 71, 72, FOURFOLD_D32(0), FOURFOLD_D32(32), FOURFOLD_D4(64))
FOURFOLD_WGMMA(144, FOURFOLD_R72, 72, 73, 74, 75, 76, FOURFOLD_D32(0), FOURFOLD_D32(32), FOURFOLD_D8(64))
FOURFOLD_WGMMA(152, FOURFOLD_R76, 76, 77, 78, 79, 80, FOURFOLD_D32(0), FOURFOLD_D32(32), FOURFOLD_D8(64),
               FOURFOLD_D4(72))
FOURFOLD_WGMMA(160, FOURFOLD_R80, 80, 81, 82, 83, 84, FOURFOLD_D32(0), FOURFOLD_D32(32), FOURFOLD_D16(64))

#undef FOURFOLD_WGMMA

}  // namespace fourfold::sm90::ptx
