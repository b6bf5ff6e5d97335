// All-reduce of the sinkhorn kernel's column sums: within a block, then over the blocks that share a matrix, which are a
// cluster (messages through distributed shared memory) or a cooperative grid (through global memory).
#pragma once

#include <cooperative_groups.h>

#include "common/dsmem.cuh"
#include "sinkhorn/rows.cuh"

namespace moe::cuda::sinkhorn_detail {

namespace cg = cooperative_groups;

constexpr int kMaxClusterBlocks = 16;
constexpr int kMaxGrid = 256;  // blocks of a grid

// Shared memory of a block, for kWidth columns; those from E on hold no mass. The last chunk of a message starts with the
// number of rows that take part.
template <int kWidth>
struct Columns {
  static constexpr int kBins = kWidth + 8;  // so that lanes of adjacent columns use different banks
  static constexpr int kPart = kWidth + 4;
  float* potential;  // (kWidth) log domain
  float* factor;     // (kWidth) on top of the potential
  float* parts;      // (warps, kPart)
  float* sums;       // (kWidth) of the block
  float* messages;   // (2, cluster blocks, kBins): a block may be one iteration ahead of another
  static constexpr size_t floats(int blocks) { return 3 * kWidth + kWarps * kPart + 2 * size_t(blocks) * kBins; }

  __device__ explicit Columns(float* shared)
      : potential(shared),
        factor(potential + kWidth),
        parts(factor + kWidth),
        sums(parts + kWarps * kPart),
        messages(sums + kWidth) {}
};

// Adjacent lanes that share a column, as many as there are threads for: each sums a part. A thread has kColumns.
template <int kWidth>
struct ColumnLanes {
  static constexpr int kFit = kThreads / kWidth;
  static constexpr int kMany = kFit < 1 ? 1 : kFit > kWarps ? kWarps : kFit;
  static constexpr int kStride = kThreads / kMany;
  static constexpr int kColumns = kWidth / kStride;
  static_assert(kWidth % kStride == 0, "every thread has as many columns");
  int mine, first;
  __device__ ColumnLanes() : mine(threadIdx.x % kMany), first(threadIdx.x / kMany) {}
  __device__ int column(int c) const { return first + c * kStride; }
};

// The block's sum of a column. All lanes of the warp.
template <int kWidth>
__device__ float block_sum(const Columns<kWidth>& columns, int e, const ColumnLanes<kWidth>& lanes) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w += ColumnLanes<kWidth>::kMany) {
    sum += columns.parts[(lanes.mine + w) * Columns<kWidth>::kPart + e];
  }
  return subwarp_sum<ColumnLanes<kWidth>::kMany>(sum);
}

// A number with its iteration, stored and loaded as one word: a reader that sees the right flag has the number, without a
// fence.
struct alignas(8) FlaggedWord {
  float number;
  int flag;  // iteration + 1; 0: none yet
};

__device__ __forceinline__ void publish(FlaggedWord* at, float number, int flag) {
  asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "f"(number), "r"(flag) : "memory");
}

__device__ __forceinline__ float spin(const FlaggedWord* at, int flag) {
  float number;
  int read;
  do {
    asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];" : "=f"(number), "=r"(read) : "l"(at) : "memory");
  } while (read != flag);
  return number;
}

// Both kinds reduce the columns, and the number of valid rows: each block contributes the sums of its warps, (kWarps,
// kPart), and its number of rows, in the first round only; then all read columns.

// A cluster: every block sends its sums to every other one, so each adds up all, in the same order.
template <int kWidth>
class ClusterAllReduce {
 public:
  static constexpr bool kIsGrid = false;

  __device__ ClusterAllReduce(const SinkhornLaunch&, const Columns<kWidth>& columns, DsmemMailbox::Barriers& barriers)
      : mailbox_(barriers), columns_(columns) {}
  __device__ void begin() const {}

  __device__ void contribute(int rows, int round, const ColumnLanes<kWidth>& lanes) const {
    const bool with_rows = round == 0;
    mailbox_.arrive_and_expect_tx(mailbox_.blocks * (kWidth + with_rows * kChunk), round);
#pragma unroll
    for (int c = 0; c < ColumnLanes<kWidth>::kColumns; ++c) {
      const float sum = block_sum(columns_, lanes.column(c), lanes);
      if (lanes.mine == 0) columns_.sums[lanes.column(c)] = sum;
    }
    if (with_rows) mailbox_.cluster_wait();
    __syncthreads();
    float* const message = messages(round) + mailbox_.block * kBins;
    if (with_rows && threadIdx.x < mailbox_.blocks) {
      mailbox_.send(message + kWidth, make_uint4(__float_as_uint(float(rows)), 0, 0, 0), threadIdx.x, round);
    }
    // Adjacent lanes send adjacent chunks to one block, which go as one message.
    constexpr int kChunks = kWidth / kChunk;
#pragma unroll
    for (int i = 0; i < ceil_div(kChunks * kMaxClusterBlocks, kThreads); ++i) {
      const int to_block = (i * kThreads + threadIdx.x) / kChunks, e = (i * kThreads + threadIdx.x) % kChunks * kChunk;
      const uint4 sums = *reinterpret_cast<const uint4*>(columns_.sums + e);
      if (to_block < mailbox_.blocks) mailbox_.send(message + e, sums, to_block, round);
    }
    mailbox_.wait(round);
  }

  // All lanes of the warp.
  __device__ float column(int e, int round, const ColumnLanes<kWidth>& lanes) const {
    constexpr int kMany = ColumnLanes<kWidth>::kMany;
    float theirs[kMaxClusterBlocks / kMany], sum = 0;  // all loaded before the first is used
#pragma unroll
    for (int i = 0; i < kMaxClusterBlocks / kMany; ++i) {
      const int r = i * kMany + lanes.mine;
      theirs[i] = r < mailbox_.blocks ? messages(round)[r * kBins + e] : 0;
    }
#pragma unroll
    for (int i = 0; i < kMaxClusterBlocks / kMany; ++i) sum += theirs[i];
    return subwarp_sum<kMany>(sum);
  }
  __device__ float rows(const ColumnLanes<kWidth>& lanes) const { return column(kWidth, 0, lanes); }

 private:
  static constexpr int kBins = Columns<kWidth>::kBins;
  __device__ float* messages(int round) const { return columns_.messages + round % 2 * mailbox_.blocks * kBins; }

  DsmemMailbox mailbox_;
  const Columns<kWidth>& columns_;
};

// A cooperative grid: every block publishes its sums, the owner of a column (one warp of the grid) reduces them and
// publishes the total. No entry is overwritten before all have read it: a block publishes again only once it has all totals.
constexpr int64_t grid_floats(int bins) { return 2 * (int64_t(kMaxGrid) + 1) * bins; }

template <int kWidth>
class GridAllReduce {
 public:
  static constexpr bool kIsGrid = true;

  __device__ GridAllReduce(const SinkhornLaunch& p, const Columns<kWidth>& columns, DsmemMailbox::Barriers&)
      : columns_(columns),
        experts_(p.experts),
        totals_(reinterpret_cast<FlaggedWord*>(p.workspace)),
        sums_(totals_ + p.experts + 1) {}

  __device__ void begin() const {
    const int bins = experts_ + 1;
    for (int b = threadIdx.x; b < bins; b += kThreads) publish(sum_of(b), 0, 0);
    for (int b = blockIdx.x * kThreads + threadIdx.x; b < bins; b += gridDim.x * kThreads) publish(totals_ + b, 0, 0);
    cg::this_grid().sync();
  }

  __device__ void contribute(int rows, int round, const ColumnLanes<kWidth>& lanes) const {
    const bool with_rows = round == 0;
    if (with_rows && threadIdx.x == 0) publish(sum_of(experts_), float(rows), round + 1);
#pragma unroll
    for (int c = 0; c < ColumnLanes<kWidth>::kColumns; ++c) {
      const int e = lanes.column(c);
      const float sum = block_sum(columns_, e, lanes);
      if (lanes.mine == 0 && e < experts_) publish(sum_of(e), sum, round + 1);
    }
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int b = blockIdx.x + warp * gridDim.x; b < experts_ + with_rows; b += kWarps * gridDim.x) {
      float sum = 0;
      const FlaggedWord* const published = sums_ + int64_t(b) * gridDim.x;
      for (int block = lane; block < gridDim.x; block += kWarp) sum += spin(published + block, round + 1);
      sum = subwarp_sum<kWarp>(sum);
      if (lane == 0) publish(totals_ + b, sum, round + 1);
    }
  }

  __device__ float column(int e, int round, const ColumnLanes<kWidth>&) const {
    return e < experts_ ? spin(totals_ + e, round + 1) : 0.0f;
  }
  __device__ float rows(const ColumnLanes<kWidth>&) const { return spin(totals_ + experts_, 1); }

 private:
  __device__ FlaggedWord* sum_of(int bin) const { return sums_ + int64_t(bin) * gridDim.x + blockIdx.x; }

  const Columns<kWidth>& columns_;
  int experts_;
  FlaggedWord* totals_;  // (bins): the columns, then the rows
  FlaggedWord* sums_;    // (bins, blocks)
};

}  // namespace moe::cuda::sinkhorn_detail
