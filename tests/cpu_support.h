// For tests of the backend "cpu": the sets of kernels that can run here.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/row_functions.h"

namespace fourfold::cpu {

/// A set of kernels, and why it can't run here.
struct KernelCase {
  std::string name;
  const Kernels* kernels = nullptr;
  std::string why_not;
};
inline void PrintTo(const KernelCase& kernel_case, std::ostream* out) {
  *out << kernel_case.name;
}

/// Every instruction set, and tiles emulated in C++.
inline std::vector<KernelCase> kernel_cases() {
  std::vector<KernelCase> cases;
  for (const Isa isa : isas()) cases.push_back({std::string(to_string(isa)), &kernels_of(isa), why_not(isa)});
  cases.push_back({"emulated_amx", &kernels_with_emulated_tiles(), why_no_emulated_tiles()});
  return cases;
}

/// Tests once for every set of kernels; skips those that can't run here, saying why.
class ForEveryIsa : public testing::TestWithParam<KernelCase> {
 protected:
  void SetUp() override {
    if (!GetParam().why_not.empty()) GTEST_SKIP() << GetParam().name << ": " << GetParam().why_not;
  }
  const Kernels& kernels() const { return *GetParam().kernels; }
  const RowFunctions& functions() const { return row_functions_of(kernels().isa); }
};

inline std::string name_of_case(const testing::TestParamInfo<KernelCase>& info) {
  return info.param.name;
}

}  // namespace fourfold::cpu
