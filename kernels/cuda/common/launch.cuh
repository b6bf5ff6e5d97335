// What every launcher and kernel here needs.
#pragma once

#include <cuda_runtime.h>

#include "dtype.h"
#include "status.h"

namespace moe::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxDevices = 64;

inline cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }

// The launch's own error, taken off the runtime so that the next call does not see it.
inline Status last_error() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {Code::kCuda, int(error)};
}

template <class T>
MOE_HD T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Multiprocessors of the current device.
inline int num_sms() {
  static int known[kMaxDevices] = {};  // a race writes the same number twice
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return 1;
  if (known[device] == 0) cudaDeviceGetAttribute(&known[device], cudaDevAttrMultiProcessorCount, device);
  return known[device] > 0 ? known[device] : 1;
}

// Launch attribute: blocks per cluster.
inline void set_cluster(cudaLaunchAttribute& attribute, unsigned blocks) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
}

// The most blocks, a power of two up to `most`, of a cluster that the current device can run. The kernel may take more
// than 8 then; its shared memory must have been allowed before. Asking takes longer than a kernel: ask once.
template <class Kernel>
int largest_cluster(Kernel* kernel, int most, int threads, size_t shared) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  int blocks = most;
  for (; blocks > 1; blocks /= 2) {
    cudaLaunchAttribute attribute{};
    set_cluster(attribute, blocks);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0) break;
  }
  cudaGetLastError();  // a size that the device refuses is no error of a launch
  return blocks;
}

// ---- programmatic dependent launch (sm_90) ---------------------------------------------------------------------
// A kernel launched with that attribute (launch_pdl) may start while the one before it in the stream still runs. It calls
// wait_on_dependent_grids before it touches global memory, so that all earlier work is done by then, and
// launch_dependent_grids when the next kernel may start. The names are those of cutlass/arch/grid_dependency_control.h.
__device__ __forceinline__ void wait_on_dependent_grids() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void launch_dependent_grids() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// What `answer` says of a kernel's attributes on the current device (null: no image for it), cached per device. All
// kernels of this module are compiled for the same architectures, so one answer per signature suffices.
template <class Kernel, class Answer>
bool cached_per_device(Kernel* kernel, const Answer& answer) {
  static int known[kMaxDevices] = {};  // 0 unknown, 1 no, 2 yes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return false;
  if (known[device] == 0) {
    cudaFuncAttributes attributes{};
    const bool told = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    known[device] = answer(told ? &attributes : nullptr) ? 2 : 1;
  }
  return known[device] == 2;
}

// Whether the kernel was compiled with sm_90's instructions: an older image can be the one that runs there.
template <class Kernel>
bool has_sm90(Kernel* kernel) {
  return cached_per_device(kernel, [](const cudaFuncAttributes* a) { return a != nullptr && a->ptxVersion >= 90; });
}

// Whether the kernel can run on the current device with all it does: for an architecture without its instructions it is
// compiled empty, for blocks of one warp.
template <class Kernel>
bool kernel_available(Kernel* kernel, int threads, int least_architecture) {
  return cached_per_device(kernel, [=](const cudaFuncAttributes* a) {
    const bool has = a != nullptr && a->maxThreadsPerBlock >= threads && a->ptxVersion >= least_architecture;
    cudaGetLastError();  // no image for this device is an answer
    return has;
  });
}

template <class... Params, class... Args>
void launch_pdl(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t shared, Stream stream,
                  Args... args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = native(stream);
  config.attrs = &early;
  config.numAttrs = has_sm90(kernel) ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, Params(args)...);  // last_error() reports its error
}

}  // namespace moe::cuda
