// The module moe_lightning._cuda. It imports without a driver and without a GPU; device_count() then says
// why nothing can run.
#include <cuda_runtime_api.h>

#include "bind.h"

namespace {

std::string explain(int error) {
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
  static std::string explain(int error) { return ::explain(error); }
};

// (number of devices, "" or why there are none)
pybind11::tuple device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return pybind11::make_tuple(count, "");
  cudaGetLastError();  // the question must not leave an error behind
  return pybind11::make_tuple(0, explain(error));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of moe_lightning";
  moe::bindings::bind<Cuda>(m);
  m.def("device_count", &device_count, "() -> (devices, '' or why there are none)");
}
