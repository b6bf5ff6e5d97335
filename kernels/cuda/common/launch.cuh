// What every launcher and kernel needs.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "dtype.h"
#include "status.h"

namespace moe::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxDevices = 64;

template <class T>
MOE_HD T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

inline cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }

// The launch's own error, taken off the runtime so that the next call does not see it.
inline Status last_error() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {Code::kCuda, int(error)};
}

// ---- queries, cached per device: they take longer than a kernel ------------------------------------------------

template <class Answer>
class PerDevice {
 public:
  // The current device's answer. Answer{} means none: where there is no device, or query() gave it; then it runs again.
  template <class Query>
  Answer get(const Query& query) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return {};
    Answer answer = known_[device].load(std::memory_order_relaxed);
    if (answer == Answer{}) known_[device].store(answer = query(device), std::memory_order_relaxed);  // may run twice
    return answer;
  }

 private:
  std::atomic<Answer> known_[kMaxDevices] = {};
};

// Multiprocessors of the current device.
inline int num_sms() {
  static PerDevice<int> known;
  const int sms = known.get([](int device) {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
  });
  return sms > 0 ? sms : 1;
}

// Whether `holds` of a kernel's attributes on the current device (null: no image for it). All kernels of this module are
// compiled for the same architectures, so one answer per signature suffices.
template <class Kernel, class Holds>
bool attributes_hold(Kernel* kernel, const Holds& holds) {
  enum : int { kUnknown, kNo, kYes };
  static PerDevice<int> known;
  return known.get([&](int) {
    cudaFuncAttributes attributes{};
    const bool has_image = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    if (!has_image) cudaGetLastError();  // no image for this device is an answer
    return int(holds(has_image ? &attributes : nullptr) ? kYes : kNo);
  }) == kYes;
}

// Whether the kernel was compiled with sm_90's instructions: an older image can be the one that runs there.
template <class Kernel>
bool has_sm90(Kernel* kernel) {
  return attributes_hold(kernel, [](const cudaFuncAttributes* a) { return a != nullptr && a->ptxVersion >= 90; });
}

// Whether the kernel can run on the current device with all it does: for an architecture without its instructions it is
// compiled empty, for blocks of one warp.
template <class Kernel>
bool kernel_available(Kernel* kernel, int threads, int least_architecture) {
  return attributes_hold(kernel, [=](const cudaFuncAttributes* a) {
    return a != nullptr && a->maxThreadsPerBlock >= threads && a->ptxVersion >= least_architecture;
  });
}

// ---- launches ---------------------------------------------------------------------------------------------------

// A launch, with its attributes.
class Launch {
 public:
  Launch(unsigned blocks, unsigned threads, size_t shared, Stream stream = nullptr) {
    config_.gridDim = dim3(blocks);
    config_.blockDim = dim3(threads);
    config_.dynamicSmemBytes = shared;
    config_.stream = native(stream);
    config_.attrs = attributes_;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  Launch& cluster(unsigned blocks) {
    auto& value = add(cudaLaunchAttributeClusterDimension);
    value.clusterDim.x = blocks;
    value.clusterDim.y = value.clusterDim.z = 1;
    return *this;
  }
  // Programmatic dependent launch: see wait_on_dependent_grids.
  Launch& pdl(bool allowed = true) {
    add(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = allowed;
    return *this;
  }
  Launch& cooperative() {
    add(cudaLaunchAttributeCooperative).cooperative = 1;
    return *this;
  }

  // last_error() reports its error.
  template <class... Params, class... Args>
  void run(void (*kernel)(Params...), const Args&... args) const {
    cudaLaunchKernelEx(&config_, kernel, Params(args)...);
  }

  // Clusters of this shape that can be active at once; 0 if none.
  template <class Kernel>
  int max_active_clusters(Kernel* kernel) const {
    int clusters = 0;
    return cudaOccupancyMaxActiveClusters(&clusters, kernel, &config_) == cudaSuccess ? clusters : 0;
  }

 private:
  cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = id;
    return attribute.val;
  }

  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[2] = {};
};

// The most blocks, a power of two up to `most`, of a cluster that the current device can run. The kernel may take more
// than 8 then; its shared memory must have been allowed before. Slow: cache the answer.
template <class Kernel>
int largest_cluster(Kernel* kernel, int most, int threads, size_t shared) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  int blocks = most;
  while (blocks > 1 && Launch(blocks, threads, shared).cluster(blocks).max_active_clusters(kernel) == 0) blocks /= 2;
  cudaGetLastError();  // a size that the device refuses is no error of a launch
  return blocks;
}

// Programmatic dependent launch (sm_90): a kernel launched so may start while the one before it in the stream still runs.
// It calls wait_on_dependent_grids before it touches global memory, so that all earlier work is done by then, and
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

template <class... Params, class... Args>
void launch_pdl(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t shared, Stream stream,
                const Args&... args) {
  Launch launch(blocks, threads, shared, stream);
  if (has_sm90(kernel)) launch.pdl();
  launch.run(kernel, args...);
}

}  // namespace moe::cuda
