// Sums of the sinkhorn kernel's columns over a block, and over the team of blocks that shares a matrix: a cluster, by
// messages into shared memory, or a cooperative grid, through global memory.
#pragma once

#include <cooperative_groups.h>

#include "cluster.cuh"
#include "sinkhorn_rows.cuh"

namespace moe::cuda::sinkhorn_detail {

namespace cg = cooperative_groups;

constexpr int kMaxTeamCluster = 16;  // blocks of a cluster that is the team by itself
constexpr int kMaxGrid = 256;        // blocks of a grid that is the team

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

  __device__ void add_up(int bins, int tag) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int b = blockIdx.x + warp * gridDim.x; b < bins; b += kWarps * gridDim.x) {
      float sum = 0;
      const Tagged* const posted = sums + int64_t(b) * gridDim.x;
      for (int block = lane; block < gridDim.x; block += kWarp) sum += await(posted + block, tag);
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
    if (whole_grid) exchange.add_up(experts + with_rows, iteration + 1);
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

}  // namespace moe::cuda::sinkhorn_detail
