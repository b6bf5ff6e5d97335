// What the bindings need of CUDA: a device guard, the launchers that both modules have, errors in words.
#pragma once

#include <cuda_runtime_api.h>

#include "bind.h"

namespace moe::bindings {

inline std::string explain_cuda(int error) {
  const auto code = static_cast<cudaError_t>(error);
  switch (code) {
    case cudaErrorInsufficientDriver:
      return "no NVIDIA driver, or one too old for this build; install or update the driver";
    case cudaErrorNoDevice:
      return "the driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES";
    case cudaErrorNoKernelImageForDevice:
      return "this build has no kernel for the GPU; rebuild with MOE_CUDA_ARCHS set to its architecture";
    default:
      return std::string(cudaGetErrorName(code)) + ", " + cudaGetErrorString(code);
  }
}

struct Cuda {
  // Makes `device` current and gives the old one back.
  class Guard {
   public:
    explicit Guard(int device) {
      if (cudaGetDevice(&before_) != cudaSuccess || before_ == device) return;
      changed_ = cudaSetDevice(device) == cudaSuccess;
    }
    ~Guard() {
      if (changed_) cudaSetDevice(before_);
    }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    int before_ = 0;
    bool changed_ = false;
  };
  static constexpr auto select_forward = &moe::cuda::select_forward;
  static constexpr auto select_backward = &moe::cuda::select_backward;
  static constexpr auto build_index = &moe::cuda::build_index;
  static int64_t index_workspace(int64_t slots, int experts) {
    return moe::cuda::index_workspace(slots, experts);
  }
  static std::string explain(int error) { return explain_cuda(error); }
};

}  // namespace moe::bindings
