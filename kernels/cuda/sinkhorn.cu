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

#include "cluster.cuh"
#include "groups.cuh"

namespace moe::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxTeamCluster = 16;  // blocks of a cluster that is the team by itself
constexpr int kMaxGrid = 256;        // blocks of a grid that is the team
constexpr float kSafe = 1e15f;       // factors stay in [1 / kSafe, kSafe]

struct SinkhornLaunch : SinkhornParams {
  float sharpness;  // 1 / temperature
  int rows;         // of a group, when they are kept
  bool whole_grid;  // the team is the grid, not one cluster
  bool aligned;     // rows of logits and scores may be moved 16 bytes at once
};

// Shared memory of a block, for kWidth columns: those from E on are there and hold no mass. The last column of a
// message counts the rows that take part.
template <int kWidth>
struct Columns {
  static constexpr int kBins = kWidth + 4;   // that lanes of a column and its neighbours fall on different banks
  static constexpr int kPart = kWidth + 4;
  float* potential;  // (kWidth) log domain
  float* factor;     // (kWidth) on top of the potential
  float* parts;      // (warps, kPart)
  float* staged;     // (kPerThread, threads), where parts are: rows on their way to registers
  float* messages;   // (2, cluster blocks, kBins): two, for a block may be an iteration ahead of another
  static constexpr size_t parts_or_staged(int staged) {
    return staged * kThreads > kWarps * kPart ? size_t(staged) * kThreads : size_t(kWarps) * kPart;
  }
  static constexpr size_t floats(int blocks, int staged) {
    return 2 * kWidth + parts_or_staged(staged) + 2 * size_t(blocks) * kBins;
  }

  __device__ Columns(float* shared, int staged_floats)
      : potential(shared),
        factor(potential + kWidth),
        parts(factor + kWidth),
        staged(parts),
        messages(parts + parts_or_staged(staged_floats)) {}
};

__device__ __forceinline__ float exp_of(float x) {  // x at most 0: off by 1e-7 at most
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// kCount neighbouring logits as they are in memory; -inf from column E on.
template <class Format, int kCount>
struct RawLogits {
  using Bits = typename Format::Bits;
  static constexpr int kPerWord = int(4 / sizeof(Bits));
  static constexpr int kPerVector = 4 * kPerWord;
  static constexpr uint32_t kMinusInf = uint32_t(uint32_t(Format::kInf) | 1u << (8 * sizeof(Bits) - 1));
  uint32_t words[kCount / kPerWord];

  __device__ void load(const SinkhornLaunch& p, int64_t t, int column) {
    const Bits* const from = static_cast<const Bits*>(p.logits) + t * p.row_stride + column;
    if (p.aligned) {
#pragma unroll
      for (int v = 0; v < kCount; v += kPerVector) {
        constexpr uint32_t kNone = kPerWord == 1 ? kMinusInf : kMinusInf * 0x10001u;
        uint4 four = make_uint4(kNone, kNone, kNone, kNone);
        if (column + v < p.experts) four = *reinterpret_cast<const uint4*>(from + v);
        memcpy(&words[v / kPerWord], &four, sizeof(four));
      }
    } else {
#pragma unroll
      for (int w = 0; w < kCount / kPerWord; ++w) {
        words[w] = 0;
#pragma unroll
        for (int i = 0; i < kPerWord; ++i) {
          const int v = w * kPerWord + i;
          const uint32_t bits = column + v < p.experts ? uint32_t(from[v]) : kMinusInf;
          words[w] |= (kPerWord == 1 ? bits : bits & 0xffffu) << (i * 16);
        }
      }
    }
  }
  __device__ float at(int v) const { return float(Format::to_real(Bits(words[v / kPerWord] >> (v % kPerWord * 16)))); }
};

// Both ends aligned to 16 bytes.
template <int kCount>
__device__ __forceinline__ void copy_vectors(const float* from, float (&to)[kCount]) {
#pragma unroll
  for (int c = 0; c < kCount; c += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + c);
    to[c] = four.x, to[c + 1] = four.y, to[c + 2] = four.z, to[c + 3] = four.w;
  }
}

template <int kCount>
__device__ void write(float* to, int inside, bool aligned, const float (&values)[kCount]) {
  if (aligned && inside >= kCount) {
#pragma unroll
    for (int c = 0; c < kCount / 4; ++c) reinterpret_cast<float4*>(to)[c] = reinterpret_cast<const float4*>(values)[c];
  } else {
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      if (v < inside) to[v] = values[v];
    }
  }
}

// One row in a group's registers: log scores with the potentials added, less their maximum.
template <class Format, int kLanes, int kPerLane>
struct Row {
  float z[kPerLane];
  bool broken, empty;  // holds a NaN or +inf; holds nothing but -inf

  static __device__ int column(int lane, int v) { return lane * kPerLane + v; }

  __device__ void set(float sharpness, const float (&potential)[kPerLane], const RawLogits<Format, kPerLane>& raw) {
    float largest = -INFINITY;
    bool strange = false;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      z[v] = raw.at(v);
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
      z[v] = (z[v] - largest) * sharpness + potential[v];
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

// Neighbouring lanes that share a column, as many as there are threads for: each adds up a part. A thread has kColumns.
template <int kWidth>
struct Helper {
  static constexpr int kFit = kThreads / kWidth;
  static constexpr int kMany = kFit < 1 ? 1 : kFit > kWarps ? kWarps : kFit;
  static constexpr int kStride = kThreads / kMany;
  static constexpr int kColumns = kWidth / kStride;
  static_assert(kWidth % kStride == 0, "every thread has as many columns");
  int mine, first;
  __device__ Helper() : mine(threadIdx.x % kMany), first(threadIdx.x / kMany) {}
  __device__ int column(int c) const { return first + c * kStride; }
};

// A number with the iteration it belongs to, stored and loaded as one: who reads the right tag has the number, and no
// fence is needed.
struct alignas(8) Tagged {
  float number;
  int tag;  // iteration + 1; 0: none yet
};

__device__ __forceinline__ void post(Tagged* at, float number, int tag) {
  asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "f"(number), "r"(tag) : "memory");
}

__device__ __forceinline__ float await(const Tagged* at, int tag) {
  float number;
  int found;
  do {
    asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];" : "=f"(number), "=r"(found) : "l"(at) : "memory");
  } while (found != tag);
  return number;
}

// A grid's exchange: every block posts its sums, the owner of a column (one warp somewhere) adds them up and posts the
// total. No entry is written anew before all have read it: a block posts again only with all totals in hand.
struct Exchange {
  Tagged* totals;  // (bins)
  Tagged* sums;    // (bins, blocks)
  static constexpr int64_t floats(int bins) { return 2 * (int64_t(kMaxGrid) + 1) * bins; }

  __device__ Exchange(float* workspace, int bins)
      : totals(reinterpret_cast<Tagged*>(workspace)), sums(totals + bins) {}

  __device__ Tagged* sum_of(int bin) const { return sums + int64_t(bin) * gridDim.x + blockIdx.x; }

  __device__ void clear(int bins) const {
    for (int b = threadIdx.x; b < bins; b += kThreads) post(sum_of(b), 0, 0);
    for (int b = blockIdx.x * kThreads + threadIdx.x; b < bins; b += gridDim.x * kThreads) post(totals + b, 0, 0);
    cg::this_grid().sync();
  }

  __device__ void add_up(int first_bin, int last_bin, int tag) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int b = first_bin + blockIdx.x + warp * gridDim.x; b < last_bin; b += kWarps * gridDim.x) {
      float sum = 0;
      for (int block = lane; block < gridDim.x; block += kWarp) sum += await(sums + int64_t(b) * gridDim.x + block, tag);
      sum = group_sum<kWarp>(sum);
      if (lane == 0) post(totals + b, sum, tag);
    }
  }
};

// The columns' sums over the blocks of the team: send every column, publish, then ask.
template <int kWidth>
struct TeamSums {
  static constexpr int kBins = Columns<kWidth>::kBins;
  Inbox& inbox;
  float* messages;  // (blocks, kBins) of this turn
  Exchange exchange;
  int iteration, experts, rank, blocks;
  bool whole_grid;

  __device__ TeamSums(const SinkhornLaunch& p, float* all_messages, Inbox& inbox, int iteration)
      : inbox(inbox),
        messages(all_messages + iteration % 2 * cluster_blocks() * kBins),
        exchange(p.workspace, p.experts + 1),
        iteration(iteration),
        experts(p.experts),
        rank(cluster_rank()),
        blocks(cluster_blocks()),
        whole_grid(p.whole_grid) {}

  // Column kWidth is the number of rows that take part; a grid keeps it behind the E columns.
  __device__ int bin_of(int e) const { return e == kWidth ? experts : e; }

  template <class Helper>
  __device__ void send(int e, float sum, const Helper& helper) const {
    if (whole_grid) {
      if (helper.mine == 0 && (e < experts || e == kWidth)) post(exchange.sum_of(bin_of(e)), sum, iteration + 1);
      return;
    }
#pragma unroll
    for (int r = helper.mine; r < kMaxTeamCluster; r += Helper::kMany) {
      if (r < blocks) inbox.send(messages + rank * kBins + e, sum, r);
    }
  }

  __device__ void publish(bool with_rows) const {
    if (whole_grid) exchange.add_up(0, experts + with_rows, iteration + 1);
    else inbox.receive(blocks * (kWidth + with_rows), iteration % 2);
  }

  // All lanes of the warp.
  template <class Helper>
  __device__ float of_team(int e, const Helper& helper) const {
    if (whole_grid) return e < experts || e == kWidth ? await(exchange.totals + bin_of(e), iteration + 1) : 0.0f;
    float sum = 0;
#pragma unroll
    for (int r = helper.mine; r < kMaxTeamCluster; r += Helper::kMany) sum += r < blocks ? messages[r * kBins + e] : 0;
    return group_sum<Helper::kMany>(sum);
  }
};

template <class Format, int kLanes, int kPerLane, int kRows>
__global__ void __launch_bounds__(kThreads) sinkhorn_kernel(const SinkhornLaunch p) {
  extern __shared__ __align__(16) float shared[];
  constexpr int kGroups = kThreads / kLanes;
  constexpr bool kKept = kRows > 0;
  using RowOf = Row<Format, kLanes, kPerLane>;
  constexpr int kWidth = kLanes * kPerLane;
  const Columns<kWidth> columns(shared, kRows * kPerLane);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kWarp;
  const int64_t groups = int64_t(gridDim.x) * kGroups;
  const int64_t first = int64_t(blockIdx.x) * kGroups + threadIdx.x / kLanes;
  const int64_t rounds = kKept ? p.rows : ceil_div(p.tokens, groups);

  __shared__ Inbox inbox;
  inbox.prepare();
  for (int e = threadIdx.x; e < kWidth; e += kThreads) {
    columns.potential[e] = 0;
    columns.factor[e] = e < p.experts ? 1.0f : 0.0f;
  }
  __syncthreads();
  let_next_start();
  wait_for_previous();
  if (p.whole_grid) Exchange(p.workspace, p.experts + 1).clear(p.experts + 1);

  float kept[kKept ? kRows : 1][kPerLane];  // exp(z); 0 in rows that take no part
  // Calls use(row, its logits, its number, whether the number is one of this group's) for the rows of this group; the next ones are on their way
  // meanwhile. The outer loop stays rolled: the code must fit the instruction cache.
  const auto each_row = [&](const auto& use) {
    constexpr int kAhead = sizeof(RawLogits<Format, kPerLane>) <= 32 ? 4 : 1;
    RawLogits<Format, kPerLane> next[kAhead];
    const auto load = [&](int64_t round, RawLogits<Format, kPerLane>& raw) {
      if (round < rounds) raw.load(p, min(first + round * groups, p.tokens - 1), RowOf::column(lane, 0));
    };
    float potential[kPerLane];
    copy_vectors<kPerLane>(columns.potential + RowOf::column(lane, 0), potential);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) load(a, next[a]);
#pragma unroll 1
    for (int64_t round = 0; round < rounds; round += kAhead) {
      RowOf rows[kAhead];  // side by side, for their latencies to overlap
      RawLogits<Format, kPerLane> raw[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) raw[a] = next[a];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) load(round + a + kAhead, next[a]);
#pragma unroll
      for (int a = 0; a < kAhead; ++a) rows[a].set(p.sharpness, potential, raw[a]);
#pragma unroll
      for (int a = 0; a < kAhead; ++a) use(rows[a], raw[a], round + a, round + a < rounds);
    }
  };
  const auto place_of = [&](int64_t round) { return first + round * groups; };
  const auto exponentials = [&](const RowOf& row, bool inside, float (&values)[kPerLane]) {
    const bool live = inside && !row.broken && !row.empty;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) values[v] = live ? exp_of(row.z[v]) : 0.0f;
    return live;
  };
  // Through shared memory, a thread to itself: only the copy needs the registers' numbers.
  const auto make_kept = [&] {
    int live = 0;
    each_row([&](const RowOf& row, const auto&, int64_t round, bool inside) {
      float values[kPerLane];
      live += exponentials(row, inside && place_of(round) < p.tokens, values);
      if (!inside) return;
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        columns.staged[(int(round) * kPerLane + v) * kThreads + threadIdx.x] = values[v];
      }
    });
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        kept[r][v] = r < p.rows ? columns.staged[(r * kPerLane + v) * kThreads + threadIdx.x] : 0.0f;
      }
    }
    __syncthreads();  // parts are there too
    return live;
  };
  int live = 0;  // rows of this group that take part
  if constexpr (kKept) live = make_kept();

  using Help = Helper<kWidth>;
  const Help helper;
  float target = 0;  // of a column's sum
  for (int i = 0; i < p.iterations; ++i) {
    float factors[kPerLane], sums[kPerLane] = {};
    copy_vectors<kPerLane>(columns.factor + RowOf::column(lane, 0), factors);
    const auto add = [&](const float (&row)[kPerLane]) {
      float sum = 0;
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) sum += row[v] * factors[v];
      sum = group_sum<kLanes>(sum);
      float scale;
      asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(scale) : "f"(sum));
      if (!(sum > 0)) scale = 0;
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) sums[v] += row[v] * scale;  // times the factor at the end
    };
    if constexpr (kKept) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) add(kept[r]);
    } else {
      each_row([&](const RowOf& row, const auto&, int64_t round, bool inside) {
        float values[kPerLane];
        const bool counts = exponentials(row, inside && place_of(round) < p.tokens, values);
        live += i == 0 && counts;
        add(values);
      });
    }
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) sums[v] *= factors[v];

    int held;
    const int offset = sum_over_groups<kLanes>(sums, held);
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      if (v < held) columns.parts[warp * Columns<kWidth>::kPart + RowOf::column(lane, offset + v)] = sums[v];
    }
    __shared__ int rows_here;
    if (i == 0) {
      if (threadIdx.x == 0) rows_here = 0;
      __syncthreads();
      const int of_warp = __reduce_add_sync(kAllLanes, lane == 0 ? live : 0);
      if (threadIdx.x % kWarp == 0) atomicAdd(&rows_here, of_warp);
    }
    __syncthreads();
    const TeamSums<kWidth> team(p, columns.messages, inbox, i);
    if (i == 0) inbox.open();
#pragma unroll
    for (int c = 0; c < Help::kColumns; ++c) {
      const int e = helper.column(c);
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; w += Help::kMany) sum += columns.parts[(w + helper.mine) * Columns<kWidth>::kPart + e];
      team.send(e, group_sum<Help::kMany>(sum), helper);
    }
    if (i == 0 && helper.first == 0) team.send(kWidth, float(rows_here), helper);
    team.publish(i == 0);

    if (i == 0) target = team.of_team(kWidth, helper) / float(p.experts);
    const float aim = fmaxf(target, FLT_MIN);
    bool far = false, unsafe = !kKept;
    float before[Help::kColumns], new_factor[Help::kColumns], found[Help::kColumns];  // factors, and sums
#pragma unroll
    for (int c = 0; c < Help::kColumns; ++c) {
      const int e = helper.column(c);
      const float sum = team.of_team(e, helper);
      if (e >= p.experts) continue;
      far |= sum > 0 && fabsf(sum - target) > p.tolerance * target;
      before[c] = columns.factor[e];
      found[c] = fmaxf(sum, FLT_MIN);
      const float factor = before[c] * __fdividef(aim, found[c]);
      unsafe |= !(factor < kSafe && factor > 1 / kSafe);
      new_factor[c] = factor;
    }
    __syncwarp();  // all helpers have read the old ones
#pragma unroll
    for (int c = 0; c < Help::kColumns; ++c) {
      if (helper.column(c) < p.experts) columns.factor[helper.column(c)] = new_factor[c];
    }
    unsafe = __syncthreads_or(unsafe);
    if (unsafe) {
#pragma unroll
      for (int c = 0; c < Help::kColumns; ++c) {
        const int e = helper.column(c);
        if (e >= p.experts || helper.mine != 0) continue;
        columns.potential[e] += logf(before[c]) + (logf(aim) - logf(found[c]));
        columns.factor[e] = 1;
      }
      __syncthreads();
    }
    if (p.tolerance > 0 && !__syncthreads_or(far)) break;
    if constexpr (kKept) {
      if (unsafe && i + 1 < p.iterations) make_kept();
    }
  }

  for (int e = threadIdx.x; e < p.experts; e += kThreads) columns.potential[e] += logf(columns.factor[e]);
  __syncthreads();
  each_row([&](const RowOf& row, const auto& raw, int64_t round, bool inside) {
    float sum = 0, scores[kPerLane];
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) sum += exp_of(row.z[v]);
    sum = group_sum<kLanes>(sum);
    const float log_sum = row.broken ? NAN : row.empty ? 0.0f : logf(sum);
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      // A mask stays one, a huge difference does not become one; fmaxf would lose a NaN.
      const float score = row.z[v] - log_sum;
      scores[v] = score == -INFINITY && raw.at(v) != -INFINITY ? -FLT_MAX : score;
    }
    const int64_t t = place_of(round);
    const int e = RowOf::column(lane, 0);
    if (inside && t < p.tokens) write(p.scores + t * p.experts + e, p.experts - e, p.aligned, scores);
  });
}

// Blocks that the device can run at once of a kernel: of a cluster that is the team, and of a grid.
struct Capacity {
  int cluster_blocks = 0, grid_blocks = 0;
};

void set_cluster(cudaLaunchConfig_t& config, cudaLaunchAttribute& attribute, unsigned blocks) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  ++config.numAttrs;
}

// `shared`: bytes of a block of the grid, and of the team's cluster.
template <class Kernel>
Capacity ask_capacity(Kernel* kernel, int team, size_t shared, size_t team_shared) {
  Capacity capacity{1, 1};
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(std::max(shared, team_shared)));
  int per_sm = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, shared);
  capacity.grid_blocks = std::clamp(per_sm * multiprocessors(), 1, kMaxGrid);
  if (!has_sm90(kernel)) return capacity;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (int blocks = team; blocks > 1 && capacity.cluster_blocks == 1; blocks /= 2) {
    cudaLaunchAttribute attribute{};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = team_shared;
    config.attrs = &attribute;
    set_cluster(config, attribute, blocks);
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error == cudaSuccess && clusters > 0) capacity.cluster_blocks = blocks;
  }
  cudaGetLastError();  // a size that the device refuses is no error of a launch
  return capacity;
}

template <class Format, int kLanes, int kPerLane, int kRows>
class Launcher {
 public:
  // Asked once a device: the questions take longer than the kernel.
  static Capacity capacity() {
    static Capacity known[kMaxDevices];
    static std::mutex mutex;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return {1, 1};
    const std::lock_guard<std::mutex> lock(mutex);
    if (known[device].cluster_blocks == 0) known[device] = ask_capacity(kKernel, kTeam, shared(1), shared(has_sm90(kKernel) ? kTeam : 1));
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
    if (cluster > 1) set_cluster(config, attributes[0], cluster);
    cudaLaunchAttribute& second = attributes[config.numAttrs++];
    second.id = p.whole_grid ? cudaLaunchAttributeCooperative : cudaLaunchAttributeProgrammaticStreamSerialization;
    if (p.whole_grid) second.val.cooperative = 1;
    else second.val.programmaticStreamSerializationAllowed = has_sm90(kKernel);
    cudaLaunchKernelEx(&config, kKernel, p);
  }

 private:
  static constexpr auto kKernel = sinkhorn_kernel<Format, kLanes, kPerLane, kRows>;
  static constexpr int kExperts = kLanes * kPerLane;
  static constexpr int kTeam = kExperts > 512 ? kMaxTeamCluster / 2 : kMaxTeamCluster;  // by the room for messages
  static constexpr size_t shared(int blocks) {
    return Columns<kExperts>::floats(blocks, kRows * kPerLane) * sizeof(float);
  }
};

template <class Format, int kLanes, int kPerLane>
void launch(SinkhornLaunch p, Stream stream) {
  constexpr int kRows = 128 / kPerLane;
  using Few = Launcher<Format, kLanes, kPerLane, kRows / 2>;
  using Kept = Launcher<Format, kLanes, kPerLane, kRows>;
  using Streamed = Launcher<Format, kLanes, kPerLane, 0>;
  const Capacity kept = Kept::capacity();
  const int64_t groups = ceil_div<int64_t>(p.tokens, kThreads / kLanes);  // of rows, to a block each
  if (groups <= int64_t(kept.cluster_blocks) * kRows) {
    unsigned blocks = 1;
    while (blocks < unsigned(kept.cluster_blocks) && blocks * 2 < groups) blocks *= 2;
    p.rows = int(ceil_div<int64_t>(groups, blocks));
    if (p.rows <= kRows / 2 && Few::capacity().cluster_blocks >= int(blocks)) return Few::start(p, blocks, blocks, stream);
    return Kept::start(p, blocks, blocks, stream);
  }
  p.whole_grid = true;
  if (groups <= int64_t(kept.grid_blocks) * kRows) {
    p.rows = int(ceil_div<int64_t>(groups, kept.grid_blocks));
    return Kept::start(p, unsigned(kept.grid_blocks), 1, stream);
  }
  const Capacity streamed = Streamed::capacity();
  Streamed::start(p, unsigned(streamed.grid_blocks), 1, stream);
}

}  // namespace

int64_t sinkhorn_workspace(int experts) { return Exchange::floats(experts + 1); }

Status sinkhorn(const SinkhornParams& params, Stream stream) {
  if (const Status status = check_sizes(params); !status.ok()) return status;
  if (params.tokens == 0) return {};
  return dispatch(params.dtype, [&](auto format) -> Status {
    using Format = decltype(format);
    const int e = params.experts;
    constexpr int kChunk = int(16 / sizeof(typename Format::Bits));
    const bool aligned = reinterpret_cast<uintptr_t>(params.logits) % 16 == 0 && params.row_stride % kChunk == 0 &&
                         reinterpret_cast<uintptr_t>(params.scores) % 16 == 0 && params.experts % kChunk == 0;
    const SinkhornLaunch p{params, 1 / params.temperature, 0, false, aligned};
    if constexpr (std::is_same_v<Format, Fp64>) return {Code::kFp64};
    else if (e <= 64) launch<Format, 8, 8>(p, stream);
    else if (e <= 128) launch<Format, 16, 8>(p, stream);
    else if (e <= 256) launch<Format, 32, 8>(p, stream);
    else launch<Format, 32, 32>(p, stream);  // check_sizes: at most 1024
    return launched();
  });
}

}  // namespace moe::cuda
