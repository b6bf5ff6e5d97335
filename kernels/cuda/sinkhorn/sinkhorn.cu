// Sinkhorn on the GPU: whether a cluster or a grid shares the matrix, and whether it stays in registers.
#include "sinkhorn.h"

#include <algorithm>

#include "sinkhorn/sinkhorn_kernel.cuh"

namespace moe::cuda {

using namespace sinkhorn_detail;

namespace {

// Blocks of a kernel that can be active at once: in one cluster, and in a grid.
struct Capacity {
  int cluster_blocks = 0, grid_blocks = 0;
  bool operator==(const Capacity& other) const {
    return cluster_blocks == other.cluster_blocks && grid_blocks == other.grid_blocks;
  }
};

template <class Format, int kLanes, int kPerLane, int kRows, template <int> class AllReduce, bool kAligned = true>
class Launcher {
 public:
  static Capacity capacity() {
    static PerDevice<Capacity> known;
    const Capacity capacity = known.get([](int) { return query_capacity(); });
    return capacity == Capacity{} ? Capacity{1, 1} : capacity;
  }

  static void start(const SinkhornLaunch& p, unsigned blocks, unsigned cluster, Stream stream) {
    Launch launch(blocks, kThreads, shared(cluster), stream);
    if (cluster > 1) launch.cluster(cluster);
    if (kIsGrid) launch.cooperative();
    else launch.pdl(has_sm90(kKernel));
    launch.run(kKernel, p);
  }

 private:
  static constexpr int kWidth = kLanes * kPerLane;
  static constexpr auto kKernel = sinkhorn_kernel<KernelTraits<Format, kLanes, kPerLane, kRows, kAligned>, AllReduce>;
  static constexpr bool kIsGrid = AllReduce<kWidth>::kIsGrid;
  static constexpr int kMostBlocks = kWidth > 512 ? kMaxClusterBlocks / 2 : kMaxClusterBlocks;  // as messages fit in smem
  static constexpr size_t shared(int blocks) { return Columns<kWidth>::floats(blocks) * sizeof(float); }

  static Capacity query_capacity() {
    const bool clusters = has_sm90(kKernel);
    const size_t cluster_shared = shared(clusters ? kMostBlocks : 1);
    cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(std::max(shared(1), cluster_shared)));
    int per_sm = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kKernel, kThreads, shared(1));
    return {clusters ? largest_cluster(kKernel, kMostBlocks, kThreads, cluster_shared) : 1,
            std::clamp(per_sm * num_sms(), 1, kMaxGrid)};
  }
};

template <class Format, class KeptFormat, int kLanes, int kPerLane>
void launch(SinkhornLaunch p, bool aligned, Stream stream) {
  constexpr int kRows = 128 / kPerLane;
  using Few = Launcher<Format, kLanes, kPerLane, kRows / 2, ClusterAllReduce>;
  using Kept = Launcher<KeptFormat, kLanes, kPerLane, kRows, ClusterAllReduce>;
  using KeptByGrid = Launcher<KeptFormat, kLanes, kPerLane, kRows, GridAllReduce>;
  using Streamed = Launcher<Format, kLanes, kPerLane, 0, GridAllReduce>;
  using Unaligned = Launcher<Format, kLanes, kPerLane, 0, GridAllReduce, false>;  // rare, and much code where rows are kept
  if (!aligned) return Unaligned::start(p, unsigned(Unaligned::capacity().grid_blocks), 1, stream);
  const int cluster_blocks = Kept::capacity().cluster_blocks;
  const int64_t rounds = ceil_div<int64_t>(p.tokens, kThreads / kLanes);  // of a block's sub-warps
  if (rounds <= int64_t(cluster_blocks) * kRows) {
    unsigned blocks = 1;
    while (blocks < unsigned(cluster_blocks) && blocks * 2 < rounds) blocks *= 2;
    p.rows = int(ceil_div<int64_t>(rounds, blocks));
    const bool few = p.rows <= kRows / 2 && Few::capacity().cluster_blocks >= int(blocks);
    return few ? Few::start(p, blocks, blocks, stream) : Kept::start(p, blocks, blocks, stream);
  }
  const int64_t grid = KeptByGrid::capacity().grid_blocks;
  if (rounds <= grid * kRows) {
    p.rows = int(ceil_div(rounds, grid));
    return KeptByGrid::start(p, unsigned(grid), 1, stream);
  }
  Streamed::start(p, unsigned(Streamed::capacity().grid_blocks), 1, stream);
}

template <class Format, class KeptFormat = AnyFp16>
void launch_for_experts(const SinkhornLaunch& p, bool aligned, Stream stream) {
  if (p.experts <= 64) launch<Format, KeptFormat, 4, 16>(p, aligned, stream);
  else if (p.experts <= 128) launch<Format, KeptFormat, 8, 16>(p, aligned, stream);
  else if (p.experts <= 256) launch<Format, KeptFormat, 16, 16>(p, aligned, stream);
  else launch<Format, KeptFormat, 32, 32>(p, aligned, stream);  // check_sizes: at most 1024
}

}  // namespace

int64_t sinkhorn_workspace(int experts) { return grid_floats(experts + 1); }

Status sinkhorn(const SinkhornParams& params, Stream stream) {
  if (const Status status = check_sizes(params); !status.ok()) return status;
  if (params.tokens == 0) return {};
  if (params.dtype == DType::kFp64) return {Code::kFp64};
  const uintptr_t chunk_bytes = kChunk * (params.dtype == DType::kFp32 ? 4 : 2);
  const bool aligned = reinterpret_cast<uintptr_t>(params.logits) % chunk_bytes == 0 &&
                       params.row_stride % kChunk == 0 && reinterpret_cast<uintptr_t>(params.scores) % 16 == 0 &&
                       params.experts % kChunk == 0;
  const SinkhornLaunch p{params, kLog2E / params.temperature, 0};
  if (params.dtype == DType::kFp32) launch_for_experts<Fp32, Fp32>(p, aligned, stream);
  else if (params.dtype == DType::kFp16) launch_for_experts<Fp16>(p, aligned, stream);
  else launch_for_experts<Bf16>(p, aligned, stream);
  return last_error();
}

}  // namespace moe::cuda
