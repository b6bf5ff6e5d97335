// Sinkhorn on the GPU, all iterations in one launch.
//
// A team of blocks shares the rows: a cluster, where the matrix fits its registers, or a cooperative grid of
// clusters. A row belongs to a group of kLanes lanes, kPerLane columns each. The matrix exp(scores + potential) is
// kept in registers (kRows rows a group), and an iteration only multiplies: the row sums, then the columns' sums over
// the team, from which every block works out the same factors of the columns. Factors that grow out of the range
// where fp32 is safe are moved into the potentials, in the log domain, and the matrix is made anew (Schmitzer,
// "Stabilized sparse scaling algorithms for entropy regularized transport problems", 2019). With kRows = 0 the
// matrix is too large to keep and is made anew in every iteration.
//
// Sums are taken in one order everywhere: the same bits on every run, in every block.
#include "sinkhorn.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <cfloat>
#include <mutex>

#include "groups.cuh"

namespace moe::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxTeamCluster = 16;  // blocks of a cluster that is the team by itself
constexpr int kGridCluster = 8;      // blocks of a cluster in a grid
constexpr int kMaxClusters = 512;    // of a grid
constexpr float kSafe = 1e15f;       // factors stay in [1 / kSafe, kSafe]

struct SinkhornLaunch : SinkhornParams {
  int rows;         // of a group, when they are kept
  bool whole_grid;  // the team is the grid, not one cluster
};

__device__ int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  return int(cg::this_cluster().num_blocks());
#else
  return 1;
#endif
}

__device__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cg::this_cluster().sync();
#else
  __syncthreads();
#endif
}

__device__ const float* in_block(const float* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return cg::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}

// Shared memory of a block. Column E of sums counts the rows that take part.
struct Columns {
  float* potential;  // (E) log domain
  float* factor;     // (E) on top of the potential
  float* parts;      // (warps, E)
  float* sums;       // (2, E + 1): of this block; iterations take turns, so that one barrier an iteration is enough
  float* totals;     // (E + 1): of the team
  static constexpr size_t floats(int experts) { return size_t(kWarps + 5) * experts + 3; }

  __device__ Columns(float* shared, int experts)
      : potential(shared),
        factor(potential + experts),
        parts(factor + experts),
        sums(parts + kWarps * experts),
        totals(sums + 2 * (experts + 1)) {}
};

// One row in a group's registers: log scores less their maximum, with the potentials added.
template <class Format, int kLanes, int kPerLane>
struct Row {
  float z[kPerLane];
  bool broken, empty;  // holds a NaN or +inf; holds nothing but -inf

  static __device__ int column(int lane, int v) { return lane * kPerLane + v; }

  __device__ void load(const SinkhornLaunch& p, const Columns& columns, int64_t t, int lane) {
    const auto* const logits = static_cast<const typename Format::Bits*>(p.logits) + t * p.row_stride;
    float largest = -INFINITY;
    bool strange = false;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      z[v] = column(lane, v) < p.experts ? float(Format::to_real(logits[column(lane, v)])) : -INFINITY;
      strange |= !(z[v] < INFINITY);
      largest = fmaxf(largest, z[v]);
    }
    const unsigned group = (kLanes == kWarp ? kAllLanes : (1u << (kLanes % kWarp)) - 1)
                           << (threadIdx.x % kWarp / kLanes * kLanes);
    broken = __ballot_sync(kAllLanes, strange) & group;
    largest = group_max<kLanes>(largest);
    empty = !broken && largest == -INFINITY;
    if (empty || broken) largest = 0;

    float top = -INFINITY;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      // Subtract first: the temperature may be small enough for a plain division to overflow.
      if (z[v] > -INFINITY) z[v] = fmaxf((z[v] - largest) / p.temperature, -FLT_MAX) + columns.potential[column(lane, v)];
      top = fmaxf(top, z[v]);
    }
    top = group_max<kLanes>(top);
    if (top == -INFINITY) top = 0;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) z[v] -= top;
  }
};

// Adds up over the groups of a warp. Halves of the columns are exchanged until each lane holds its own share, the
// first `held` of x, which belong to columns from the returned one on.
template <int kLanes, int kPerLane>
__device__ int sum_over_groups(float (&x)[kPerLane], int& held) {
  int first = 0, n = kPerLane;
#pragma unroll
  for (int step = kWarp / 2; step >= kLanes; step /= 2) {
    if (n > 1) {
      n /= 2;
      const bool upper = threadIdx.x & step;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i < n) {
          const float given = upper ? x[i] : x[i + n];
          const float kept = upper ? x[i + n] : x[i];
          x[i] = kept + __shfl_xor_sync(kAllLanes, given, step);
        }
      }
      first += upper ? n : 0;
    } else {
      x[0] += __shfl_xor_sync(kAllLanes, x[0], step);
    }
  }
  held = n;
  return first;
}

// columns.totals becomes the sum of columns.sums[turn] over the blocks of the team.
__device__ void sum_over_team(const SinkhornLaunch& p, Columns& columns, int turn) {
  const int bins = p.experts + 1;
  const float* const mine = columns.sums + turn * bins;
  const int blocks = cluster_blocks();
  cluster_sync();
  if (!p.whole_grid) {
    for (int e = threadIdx.x; e < bins; e += kThreads) {
      float sum = 0;
#pragma unroll
      for (int r = 0; r < kMaxTeamCluster; ++r) sum += r < blocks ? *in_block(mine + e, r) : 0.0f;
      columns.totals[e] = sum;
    }
  } else {
    const int clusters = gridDim.x / blocks, cluster = blockIdx.x / blocks, rank = blockIdx.x % blocks;
    float* const table = p.workspace + int64_t(turn) * kMaxClusters * bins;
    for (int e = rank * kThreads + threadIdx.x; e < bins; e += kThreads * blocks) {
      float sum = 0;
      for (int r = 0; r < blocks; ++r) sum += *in_block(mine + e, r);
      table[int64_t(cluster) * bins + e] = sum;
    }
    cg::this_grid().sync();
    for (int e = threadIdx.x; e < bins; e += kThreads) {
      float sum = 0;
#pragma unroll 8
      for (int c = 0; c < clusters; ++c) sum += __ldcg(table + int64_t(c) * bins + e);
      columns.totals[e] = sum;
    }
  }
  __syncthreads();
}

template <class Format, int kLanes, int kPerLane, int kRows>
__global__ void __launch_bounds__(kThreads) sinkhorn_kernel(const SinkhornLaunch p) {
  extern __shared__ float shared[];
  constexpr int kGroups = kThreads / kLanes;
  constexpr bool kKept = kRows > 0;
  using RowOf = Row<Format, kLanes, kPerLane>;
  Columns columns(shared, p.experts);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kWarp;
  const int64_t groups = int64_t(gridDim.x) * kGroups;
  const int64_t first = int64_t(blockIdx.x) * kGroups + threadIdx.x / kLanes;
  const int64_t rounds = kKept ? p.rows : ceil_div(p.tokens, groups);

  for (int e = threadIdx.x; e < p.experts; e += kThreads) {
    columns.potential[e] = 0;
    columns.factor[e] = 1;
  }
  __syncthreads();
  let_next_start();
  wait_for_previous();

  float kept[kKept ? kRows : 1][kPerLane];  // exp(z); 0 in rows that take no part
  const auto make = [&](float (&row)[kPerLane], int64_t round) {
    const int64_t t = first + round * groups;
    RowOf values;
    values.load(p, columns, t < p.tokens ? t : 0, lane);
    const bool out = t >= p.tokens || values.broken || values.empty;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) row[v] = out ? 0.0f : expf(values.z[v]);
  };
  const auto make_kept = [&] {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < p.rows) make(kept[r], r);
    }
  };
  if constexpr (kKept) make_kept();

  for (int i = 0; i < p.iterations; ++i) {
    float factors[kPerLane], sums[kPerLane] = {}, live = 0;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      const int e = RowOf::column(lane, v);
      factors[v] = e < p.experts ? columns.factor[e] : 0;
    }
    const auto add = [&](const float (&row)[kPerLane]) {
      float sum = 0;
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) sum += row[v] * factors[v];
      sum = group_sum<kLanes>(sum);
      const float scale = sum > 0 ? 1.0f / sum : 0.0f;
      live += sum > 0 ? 1.0f : 0.0f;
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) sums[v] += row[v] * (factors[v] * scale);
    };
    if constexpr (kKept) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < p.rows) add(kept[r]);
      }
    } else {
      for (int64_t round = 0; round < rounds; ++round) {
        make(kept[0], round);
        add(kept[0]);
      }
    }

    int held;
    const int offset = sum_over_groups<kLanes>(sums, held);
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      const int e = RowOf::column(lane, offset + v);
      if (v < held && e < p.experts) columns.parts[warp * p.experts + e] = sums[v];
    }
    const int turn = i % 2;
    float* const mine = columns.sums + turn * (p.experts + 1);
    if (threadIdx.x == 0) mine[p.experts] = 0;
    __syncthreads();
    for (int e = threadIdx.x; e < p.experts; e += kThreads) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += columns.parts[w * p.experts + e];
      mine[e] = sum;
    }
    if (lane == 0) atomicAdd(&mine[p.experts], live);  // whole numbers: exact in any order
    sum_over_team(p, columns, turn);

    const float target = columns.totals[p.experts] / float(p.experts);
    bool far = false, unsafe = !kKept;
    for (int e = threadIdx.x; e < p.experts; e += kThreads) {
      const float sum = columns.totals[e];
      far |= sum > 0 && fabsf(sum - target) > p.tolerance * target;
      const float factor = columns.factor[e] * (fmaxf(target, FLT_MIN) / fmaxf(sum, FLT_MIN));
      unsafe |= !(factor < kSafe && factor > 1 / kSafe);
    }
    unsafe = __syncthreads_or(unsafe);
    for (int e = threadIdx.x; e < p.experts; e += kThreads) {
      const float sum = fmaxf(columns.totals[e], FLT_MIN), aim = fmaxf(target, FLT_MIN);
      if (unsafe) {
        columns.potential[e] += logf(columns.factor[e]) + (logf(aim) - logf(sum));
        columns.factor[e] = 1;
      } else {
        columns.factor[e] *= aim / sum;
      }
    }
    const bool again = p.tolerance > 0 ? __syncthreads_or(far) : (__syncthreads(), true);
    if (!again) break;
    if constexpr (kKept) {
      if (unsafe && i + 1 < p.iterations) make_kept();
    }
  }

  for (int e = threadIdx.x; e < p.experts; e += kThreads) columns.potential[e] += logf(columns.factor[e]);
  __syncthreads();
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t t = first + round * groups;
    RowOf row;
    row.load(p, columns, t < p.tokens ? t : 0, lane);
    float sum = 0;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) sum += expf(row.z[v]);
    const float log_sum = logf(group_sum<kLanes>(sum));
    if (t >= p.tokens) continue;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      const int e = RowOf::column(lane, v);
      if (e >= p.experts) continue;
      const bool mask = row.z[v] == -INFINITY;
      const float score = mask ? -INFINITY : fmaxf(row.z[v] - log_sum, -FLT_MAX);
      p.scores[t * p.experts + e] = row.broken ? NAN : score;
    }
  }
  cluster_sync();  // a block's sums may still be read
}

// What the device can run at once of a kernel: blocks of a cluster that is a team, and blocks of a grid.
struct Capacity {
  int cluster_blocks = 0, grid_blocks = 0, grid_cluster = 1;
};

void set_cluster(cudaLaunchConfig_t& config, cudaLaunchAttribute& attribute, unsigned blocks) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  ++config.numAttrs;
}

template <class Kernel>
Capacity ask_capacity(Kernel* kernel, size_t shared) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  const int sms = multiprocessors();  // one block each: two are no faster
  if (!has_sm90(kernel)) return {1, std::min(sms, kMaxClusters), 1};
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  const auto clusters_of = [&](unsigned blocks) {
    cudaLaunchAttribute attribute{};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared;
    config.attrs = &attribute;
    set_cluster(config, attribute, blocks);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) clusters = 0;
    cudaGetLastError();  // a size that the device refuses is no error of a launch
    return clusters;
  };
  const int clusters = std::min({clusters_of(kGridCluster), sms / kGridCluster, kMaxClusters});
  return {clusters_of(kMaxTeamCluster) > 0 ? kMaxTeamCluster : kGridCluster, clusters * kGridCluster, kGridCluster};
}

template <class Format, int kLanes, int kPerLane, int kRows>
class Launcher {
 public:
  // Asked once a device: the questions take longer than the kernel.
  static Capacity capacity() {
    static Capacity known[kMaxDevices];
    static std::mutex mutex;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return {1, 1, 1};
    const std::lock_guard<std::mutex> lock(mutex);
    if (known[device].cluster_blocks == 0) known[device] = ask_capacity(kKernel, kShared);
    return known[device];
  }

  static void start(const SinkhornLaunch& p, unsigned blocks, unsigned cluster, Stream stream) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kShared;
    config.stream = native(stream);
    config.attrs = attributes;
    if (cluster > 1) set_cluster(config, attributes[0], cluster);
    cudaLaunchAttribute& second = attributes[config.numAttrs++];
    second.id = p.whole_grid ? cudaLaunchAttributeCooperative : cudaLaunchAttributeProgrammaticStreamSerialization;
    if (p.whole_grid) second.val.cooperative = 1;
    else second.val.programmaticStreamSerializationAllowed = has_sm90(kKernel);
    cudaLaunchKernelEx(&config, kKernel, p);
  }

 private:
  static constexpr auto kKernel = sinkhorn_kernel<Format, kLanes, kPerLane, kRows>;
  static constexpr size_t kShared = Columns::floats(kLanes * kPerLane) * sizeof(float);
};

template <class Format, int kLanes, int kPerLane>
void launch(SinkhornLaunch p, Stream stream) {
  constexpr int kRows = 64 / kPerLane;
  using Kept = Launcher<Format, kLanes, kPerLane, kRows>;
  using Streamed = Launcher<Format, kLanes, kPerLane, 0>;
  const Capacity kept = Kept::capacity();
  const int64_t groups = ceil_div<int64_t>(p.tokens, kThreads / kLanes);  // of rows, to a block each
  if (groups <= int64_t(kept.cluster_blocks) * kRows) {
    unsigned blocks = 1;
    while (blocks < unsigned(kept.cluster_blocks) && blocks * 2 < groups) blocks *= 2;
    p.rows = int(ceil_div<int64_t>(groups, blocks));
    return Kept::start(p, blocks, blocks, stream);
  }
  p.whole_grid = true;
  if (groups <= int64_t(kept.grid_blocks) * kRows) {
    p.rows = int(ceil_div<int64_t>(groups, kept.grid_blocks));
    return Kept::start(p, unsigned(kept.grid_blocks), unsigned(kept.grid_cluster), stream);
  }
  const Capacity streamed = Streamed::capacity();
  Streamed::start(p, unsigned(streamed.grid_blocks), unsigned(streamed.grid_cluster), stream);
}

}  // namespace

int64_t sinkhorn_workspace(int experts) { return 2 * int64_t(kMaxClusters) * (experts + 1); }

Status sinkhorn(const SinkhornParams& params, Stream stream) {
  if (const Status status = check_sizes(params); !status.ok()) return status;
  if (params.tokens == 0) return {};
  return dispatch(params.dtype, [&](auto format) -> Status {
    using Format = decltype(format);
    const int e = params.experts;
    const SinkhornLaunch p{params, 0, false};
    if constexpr (std::is_same_v<Format, Fp64>) return {Code::kFp64};
    else if (e <= 64) launch<Format, 8, 8>(p, stream);
    else if (e <= 128) launch<Format, 16, 8>(p, stream);
    else if (e <= 256) launch<Format, 32, 8>(p, stream);
    else launch<Format, 32, 32>(p, stream);  // check_sizes: at most 1024
    return launched();
  });
}

}  // namespace moe::cuda
