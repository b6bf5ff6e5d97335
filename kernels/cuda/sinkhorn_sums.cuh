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

// Shared memory of a block, for kWidth columns: those from E on are there and hold no mass. The last chunk of a
// message starts with the number of rows that take part.
template <int kWidth>
struct Columns {
  static constexpr int kBins = kWidth + 8;  // that lanes of a column and its neighbours fall on different banks
  static constexpr int kPart = kWidth + 4;
  float* potential;  // (kWidth) log domain
  float* factor;     // (kWidth) on top of the potential
  float* parts;      // (warps, kPart)
  float* messages;   // (2, cluster blocks, kBins): two, for a block may be an iteration ahead of another
  static constexpr size_t floats(int blocks) { return 2 * kWidth + kWarps * kPart + 2 * size_t(blocks) * kBins; }

  __device__ explicit Columns(float* shared)
      : potential(shared), factor(potential + kWidth), parts(factor + kWidth), messages(parts + kWarps * kPart) {}
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

// The columns' sums over the blocks of the team: send the block's, publish, then ask.
template <int kWidth>
struct TeamSums {
  static constexpr int kBins = Columns<kWidth>::kBins;
  static constexpr int kPart = Columns<kWidth>::kPart;
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

  // Adds up what the warps hold, and sends it.
  template <class Helper>
  __device__ void send(const float* parts, const Helper& helper) const {
    if (whole_grid) {
#pragma unroll
      for (int c = 0; c < Helper::kColumns; ++c) {
        const int e = helper.column(c);
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; w += Helper::kMany) sum += parts[(helper.mine + w) * kPart + e];
        sum = group_sum<Helper::kMany>(sum);
        if (helper.mine == 0 && e < experts) post(exchange.sum_of(e), sum, iteration + 1);
      }
      return;
    }
    // Each block adds up anew for every receiver: that is sooner done than handed on.
    constexpr int kChunks = kWidth / kChunk;
    for (int i = threadIdx.x; i < kChunks * blocks; i += kThreads) {
      const int e = i % kChunks * kChunk;
      float4 sum{};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float4 part = *reinterpret_cast<const float4*>(parts + w * kPart + e);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      inbox.send(messages + rank * kBins + e, sum, i / kChunks, iteration);
    }
  }

  __device__ void send_rows(int rows) const {
    if (whole_grid && threadIdx.x == 0) post(exchange.sum_of(experts), float(rows), iteration + 1);
    if (!whole_grid && threadIdx.x < blocks) {
      inbox.send(messages + rank * kBins + kWidth, make_float4(float(rows), 0, 0, 0), threadIdx.x, iteration);
    }
  }

  __device__ void publish(bool with_rows) const {
    if (whole_grid) exchange.add_up(experts + with_rows, iteration + 1);
    else inbox.receive(blocks * (kWidth + with_rows * kChunk), iteration);
  }

  // All lanes of the warp.
  template <class Helper>
  __device__ float of_team(int e, const Helper& helper) const {
    if (whole_grid) return e < experts || e == kWidth ? await(exchange.totals + bin_of(e), iteration + 1) : 0.0f;
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kMaxTeamCluster; r += Helper::kMany) {
      if (r + helper.mine < blocks) sum += messages[(r + helper.mine) * kBins + e];
    }
    return group_sum<Helper::kMany>(sum);
  }
};

}  // namespace moe::cuda::sinkhorn_detail
