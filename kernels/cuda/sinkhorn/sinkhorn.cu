// Sinkhorn on the GPU: whether a cluster or a grid shares the matrix, and whether it stays in registers.
#include "sinkhorn.h"

#include <algorithm>
#include <mutex>

#include "sinkhorn/sinkhorn_kernel.cuh"

namespace moe::cuda {

using namespace sinkhorn_detail;

namespace {

// Blocks of a kernel that can be active at once: in one cluster, and in a grid.
struct Capacity {
  int cluster_blocks = 0, grid_blocks = 0;
};

// Bytes of shared memory per block: of a grid, and of a cluster.
template <class Kernel>
Capacity ask_capacity(Kernel* kernel, int all_reduce, size_t shared, size_t team_shared) {
  Capacity capacity{1, 1};
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(std::max(shared, team_shared)));
  int per_sm = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, shared);
  capacity.grid_blocks = std::clamp(per_sm * num_sms(), 1, kMaxGrid);
  if (!has_sm90(kernel)) return capacity;
  capacity.cluster_blocks = largest_cluster(kernel, all_reduce, kThreads, team_shared);
  return capacity;
}

template <class Format, int kLanes, int kPerLane, int kRows, template <int> class AllReduce>
class Launcher {
 public:
  // Queried once per device: the queries take longer than the kernel.
  static Capacity capacity() {
    static Capacity known[kMaxDevices];
    static std::mutex mutex;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return {1, 1};
    const std::lock_guard<std::mutex> lock(mutex);
    if (known[device].cluster_blocks == 0) {
      known[device] = ask_capacity(kKernel, kMostBlocks, shared(1), shared(has_sm90(kKernel) ? kMostBlocks : 1));
    }
    return known[device];
  }

  static void start(const SinkhornLaunch& p, unsigned blocks, unsigned cluster, Stream stream) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared(cluster);
    config.stream = native(stream);
    config.attrs = attributes;
    if (cluster > 1) set_cluster(attributes[config.numAttrs++], cluster);
    cudaLaunchAttribute& second = attributes[config.numAttrs++];
    second.id = kIsGrid ? cudaLaunchAttributeCooperative : cudaLaunchAttributeProgrammaticStreamSerialization;
    if (kIsGrid) second.val.cooperative = 1;
    else second.val.programmaticStreamSerializationAllowed = has_sm90(kKernel);
    cudaLaunchKernelEx(&config, kKernel, p);
  }

 private:
  static constexpr auto kKernel = sinkhorn_kernel<Format, kLanes, kPerLane, kRows, AllReduce>;
  static constexpr bool kIsGrid = AllReduce<kLanes * kPerLane>::kIsGrid;
  static constexpr int kWidth = kLanes * kPerLane;
  static constexpr int kMostBlocks = kWidth > 512 ? kMaxClusterBlocks / 2 : kMaxClusterBlocks;  // by the room for messages
  static constexpr size_t shared(int blocks) {
    return Columns<kWidth>::floats(blocks) * sizeof(float);
  }
};

template <class Format, int kLanes, int kPerLane>
void launch(SinkhornLaunch p, Stream stream) {
  constexpr int kRows = 128 / kPerLane;
  using Few = Launcher<Format, kLanes, kPerLane, kRows / 2, ClusterAllReduce>;
  using Kept = Launcher<Format, kLanes, kPerLane, kRows, ClusterAllReduce>;
  using KeptByGrid = Launcher<Format, kLanes, kPerLane, kRows, GridAllReduce>;
  using Streamed = Launcher<Format, kLanes, kPerLane, 0, GridAllReduce>;
  const Capacity kept = Kept::capacity();
  const int64_t groups = ceil_div<int64_t>(p.tokens, kThreads / kLanes);  // of rows, to a block each
  if (groups <= int64_t(kept.cluster_blocks) * kRows) {
    unsigned blocks = 1;
    while (blocks < unsigned(kept.cluster_blocks) && blocks * 2 < groups) blocks *= 2;
    p.rows = int(ceil_div<int64_t>(groups, blocks));
    const bool few = p.rows <= kRows / 2 && Few::capacity().cluster_blocks >= int(blocks);
    if (few) return Few::start(p, blocks, blocks, stream);
    return Kept::start(p, blocks, blocks, stream);
  }
  const int64_t grid = KeptByGrid::capacity().grid_blocks;
  if (groups <= grid * kRows) {
    p.rows = int(ceil_div(groups, grid));
    return KeptByGrid::start(p, unsigned(grid), 1, stream);
  }
  Streamed::start(p, unsigned(Streamed::capacity().grid_blocks), 1, stream);
}

}  // namespace

int64_t sinkhorn_workspace(int experts) { return grid_floats(experts + 1); }

Status sinkhorn(const SinkhornParams& params, Stream stream) {
  if (const Status status = check_sizes(params); !status.ok()) return status;
  if (params.tokens == 0) return {};
  return dispatch_dtype(params.dtype, [&](auto format) -> Status {
    using Format = decltype(format);
    const int e = params.experts;
    constexpr uintptr_t kChunkBytes = kChunk * sizeof(typename Format::Bits);
    const bool aligned = reinterpret_cast<uintptr_t>(params.logits) % kChunkBytes == 0 &&
                         params.row_stride % kChunk == 0 &&
                         reinterpret_cast<uintptr_t>(params.scores) % 16 == 0 && params.experts % kChunk == 0;
    const SinkhornLaunch p{params, kLog2E / params.temperature, 0, aligned};
    if constexpr (std::is_same_v<Format, Fp64>) return {Code::kFp64};
    else if (e <= 64) launch<Format, 4, 16>(p, stream);
    else if (e <= 128) launch<Format, 8, 16>(p, stream);
    else if (e <= 256) launch<Format, 16, 16>(p, stream);
    else launch<Format, 32, 32>(p, stream);  // check_sizes: at most 1024
    return last_error();
  });
}

}  // namespace moe::cuda
