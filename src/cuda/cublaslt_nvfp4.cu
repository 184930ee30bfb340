#include "cuda/cublaslt_nvfp4.h"

#include <cuda_runtime.h>

#include "cuda/check.cuh"
#include "cuda/device.h"

// CUDA 12.8 brought the type and the scale mode.
#if __has_include(<cublasLt.h>) && CUDART_VERSION >= 12080
#include <cublasLt.h>
#include <dlfcn.h>
#define FOURFOLD_HAS_CUBLASLT 1
#else
#define FOURFOLD_HAS_CUBLASLT 0
#endif

namespace fourfold::cuda {

#if FOURFOLD_HAS_CUBLASLT
namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;

/// The library, as far as it is needed.
struct CublasLt {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtMatmulDescCreate) create_description = nullptr;
  decltype(&cublasLtMatmulDescDestroy) destroy_description = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_attribute = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) create_layout = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) destroy_layout = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) create_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) destroy_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) choose = nullptr;
  decltype(&cublasLtMatmul) multiply = nullptr;
  bool complete = false;

  CublasLt() {
    void* library = nullptr;  // stays loaded: unloading CUDA libraries is not safe
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
      library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      if (library != nullptr) break;
    }
    if (library == nullptr) return;
    complete = true;
    const auto find = [&](const char* name, auto& function) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      complete &= function != nullptr;
    };
    find("cublasLtCreate", create);
    find("cublasLtDestroy", destroy);
    find("cublasLtMatmulDescCreate", create_description);
    find("cublasLtMatmulDescDestroy", destroy_description);
    find("cublasLtMatmulDescSetAttribute", set_attribute);
    find("cublasLtMatrixLayoutCreate", create_layout);
    find("cublasLtMatrixLayoutDestroy", destroy_layout);
    find("cublasLtMatmulPreferenceCreate", create_preference);
    find("cublasLtMatmulPreferenceDestroy", destroy_preference);
    find("cublasLtMatmulPreferenceSetAttribute", set_preference);
    find("cublasLtMatmulAlgoGetHeuristic", choose);
    find("cublasLtMatmul", multiply);
  }
};

/// Owns what cuBLASLt makes for one GEMM. As it sees matrices, column by column, it is d^T = (b^T)^T . a^T.
class LtMultiply {
 public:
  explicit LtMultiply(const CublasLt& lt) : lt_(lt) {}
  ~LtMultiply() {
    for (cublasLtMatrixLayout_t layout : layouts_) {
      if (layout != nullptr) lt_.destroy_layout(layout);
    }
    if (preference_ != nullptr) lt_.destroy_preference(preference_);
    if (description_ != nullptr) lt_.destroy_description(description_);
    if (handle_ != nullptr) lt_.destroy(handle_);
  }
  LtMultiply(const LtMultiply&) = delete;
  LtMultiply& operator=(const LtMultiply&) = delete;

  /// -> why not.
  std::string run(const Nvfp4Gemm& gemm) {
    const auto depth = static_cast<uint64_t>(gemm.depth);
    const auto rows = static_cast<uint64_t>(gemm.rows), columns = static_cast<uint64_t>(gemm.columns);
    const cublasOperation_t transposed = CUBLAS_OP_T, plain = CUBLAS_OP_N;
    const cublasLtMatmulMatrixScale_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3;
    const bool described =
        is_done(lt_.create(&handle_)) &&
        is_done(lt_.create_description(&description_, CUBLAS_COMPUTE_32F, CUDA_R_32F)) &&
        describe(CUBLASLT_MATMUL_DESC_TRANSA, transposed) && describe(CUBLASLT_MATMUL_DESC_TRANSB, plain) &&
        describe(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode) &&
        describe(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode) &&
        describe(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, gemm.b_scales) &&
        describe(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, gemm.a_scales) &&
        is_done(lt_.create_layout(&layouts_[0], CUDA_R_4F_E2M1, depth, columns, gemm.depth)) &&
        is_done(lt_.create_layout(&layouts_[1], CUDA_R_4F_E2M1, depth, rows, gemm.depth)) &&
        is_done(lt_.create_layout(&layouts_[2], CUDA_R_16BF, columns, rows, gemm.columns)) &&
        is_done(lt_.create_preference(&preference_)) &&
        is_done(lt_.set_preference(preference_, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspaceBytes,
                                   sizeof(kWorkspaceBytes)));
    if (!described) return "cuBLASLt knows no such GEMM (status " + std::to_string(status_) + ")";
    cublasLtMatmulHeuristicResult_t choice{};
    int found = 0;
    const bool chosen = is_done(lt_.choose(handle_, description_, layouts_[0], layouts_[1], layouts_[2],
                                           layouts_[2], preference_, 1, &choice, &found));
    if (!chosen || found == 0)
      return "cuBLASLt has no such GEMM for this GPU (status " + std::to_string(status_) + ")";
    const Buffer workspace = device_memory(current_device()).allocate(kWorkspaceBytes);
    const float beta = 0.0f;
    if (!is_done(lt_.multiply(handle_, description_, &gemm.alpha, gemm.b_codes, layouts_[0], gemm.a_codes,
                              layouts_[1], &beta, gemm.d, layouts_[2], gemm.d, layouts_[2], &choice.algo,
                              workspace.data(), kWorkspaceBytes, nullptr))) {
      return "cuBLASLt failed (status " + std::to_string(status_) + ")";
    }
    check(cudaDeviceSynchronize(), "cublasLtMatmul");
    return "";
  }

 private:
  bool is_done(cublasStatus_t status) {
    status_ = static_cast<int>(status);
    return status == CUBLAS_STATUS_SUCCESS;
  }
  template <class Value>
  bool describe(cublasLtMatmulDescAttributes_t attribute, const Value& value) {
    return is_done(lt_.set_attribute(description_, attribute, &value, sizeof(value)));
  }

  const CublasLt& lt_;
  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t description_ = nullptr;
  cublasLtMatmulPreference_t preference_ = nullptr;
  cublasLtMatrixLayout_t layouts_[3] = {};
  int status_ = 0;
};

}  // namespace

std::string multiply_by_cublaslt(const Nvfp4Gemm& gemm) {
  static const CublasLt lt;
  if (!lt.complete) return "no cuBLASLt on this machine";
  return LtMultiply(lt).run(gemm);
}

#else

std::string multiply_by_cublaslt(const Nvfp4Gemm&) {
  return "built without the header of a cuBLASLt that has NVFP4";
}

#endif

}  // namespace fourfold::cuda
