// The routing index on the GPU: a counting sort in three launches, the same bits on every run.
//   1. each warp counts the ids of its own contiguous tile of slots;
//   2. each bin's counts are scanned over the tiles;
//   3. each warp walks its tile again, in slot order, and gives every slot its row.
// Workspace: counts (bins, tiles), then the total of each bin. Bins are the E experts and one for drops.
#include "index.h"

#include <algorithm>

#include "launch.cuh"

namespace moe::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMinTile = 256;    // slots
constexpr int kMaxTiles = 1024;

struct Tiling {
  int32_t tile;   // slots a warp owns, a multiple of the warp size
  int32_t tiles;
};

Tiling tiling(int64_t slots) {
  const int64_t even = ceil_div<int64_t>(ceil_div<int64_t>(slots, kMaxTiles), kWarp) * kWarp;
  const int64_t tile = std::max<int64_t>(even, kMinTile);
  return {int32_t(tile), int32_t(ceil_div(slots, tile))};
}

// As unsigned, every id outside [0, E) is too large, -1 included.
__device__ int bin_of(int32_t id, int experts) { return uint32_t(id) < uint32_t(experts) ? id : experts; }

__global__ void __launch_bounds__(kThreads) count_kernel(const IndexParams p, Tiling tiling) {
  extern __shared__ int32_t shared[];
  const int bins = p.experts + 1, lane = threadIdx.x % kWarp;
  const int tile = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (tile >= tiling.tiles) return;
  int32_t* counts = shared + threadIdx.x / kWarp * bins;

  for (int b = lane; b < bins; b += kWarp) counts[b] = 0;
  __syncwarp();
  const int64_t begin = int64_t(tile) * tiling.tile, end = min(begin + tiling.tile, p.slots);
  for (int64_t slot = begin + lane; slot < end; slot += kWarp) {
    atomicAdd(&counts[bin_of(p.expert_ids[slot], p.experts)], 1);
  }
  __syncwarp();
  for (int b = lane; b < bins; b += kWarp) p.workspace[int64_t(b) * tiling.tiles + tile] = counts[b];
}

// A warp a bin: counts become the number of that bin's slots in lower tiles.
__global__ void __launch_bounds__(kThreads) scan_kernel(const IndexParams p, Tiling tiling) {
  const int bins = p.experts + 1, lane = threadIdx.x % kWarp;
  const int bin = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (bin >= bins) return;
  int32_t* counts = p.workspace + int64_t(bin) * tiling.tiles;
  int32_t before = 0, total;
  for (int first = 0; first < tiling.tiles; first += kWarp) {
    const int i = first + lane;
    const int32_t lower = warp_exclusive_sum(i < tiling.tiles ? counts[i] : 0, total);
    if (i < tiling.tiles) counts[i] = before + lower;
    before += total;
  }
  if (lane == 0) p.workspace[int64_t(bins) * tiling.tiles + bin] = before;
}

__global__ void __launch_bounds__(kThreads) place_kernel(const IndexParams p, Tiling tiling) {
  extern __shared__ int32_t shared[];  // the start of each bin, then a row of cursors a warp
  const int bins = p.experts + 1, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t* totals = p.workspace + int64_t(bins) * tiling.tiles;
  int32_t* starts = shared;
  if (warp == 0) {
    int32_t before = 0, total;
    for (int first = 0; first < bins; first += kWarp) {
      const int b = first + lane;
      const int32_t lower = warp_exclusive_sum(b < bins ? totals[b] : 0, total);
      if (b < bins) starts[b] = before + lower;
      if (b < bins && blockIdx.x == 0) p.expert_offsets[b] = before + lower;
      before += total;
    }
  }
  __syncthreads();

  const int tile = blockIdx.x * kWarps + warp;
  if (tile >= tiling.tiles) return;
  int32_t* next = shared + (1 + warp) * bins;
  for (int b = lane; b < bins; b += kWarp) {
    next[b] = starts[b] + p.workspace[int64_t(b) * tiling.tiles + tile];
  }
  __syncwarp();

  const int64_t begin = int64_t(tile) * tiling.tile, end = min(begin + tiling.tile, p.slots);
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t slot = first + lane;
    const unsigned active = __ballot_sync(kAllLanes, slot < end);
    if (slot < end) {
      const int bin = bin_of(p.expert_ids[slot], p.experts);
      const unsigned peers = __match_any_sync(active, bin);
      const int rank = __popc(peers & ((1u << lane) - 1));  // slots of this bin in lower lanes
      const int32_t row = next[bin] + rank;
      p.perm[row] = int32_t(slot);
      p.inverse_perm[slot] = row;
      __syncwarp(active);  // all have read the cursors
      if (rank == 0) next[bin] += __popc(peers);
    }
    __syncwarp();
  }
}

}  // namespace

int64_t index_workspace(int64_t slots, int experts) {
  return int64_t(experts + 1) * (tiling(slots).tiles + 1);
}

Status build_index(const IndexParams& p, Stream raw) {
  if (const Status status = check_sizes(p); !status.ok()) return status;
  if (p.slots == 0) {
    const auto bytes = sizeof(int32_t) * (p.experts + 1);
    const cudaError_t error = cudaMemsetAsync(p.expert_offsets, 0, bytes, native(raw));
    return error == cudaSuccess ? Status{} : Status{Code::kCuda, int(error)};
  }
  const cudaStream_t stream = native(raw);
  const Tiling t = tiling(p.slots);
  const int bins = p.experts + 1;
  const unsigned tile_blocks = ceil_div(t.tiles, kWarps);
  const size_t row = sizeof(int32_t) * bins;
  count_kernel<<<tile_blocks, kThreads, kWarps * row, stream>>>(p, t);
  scan_kernel<<<ceil_div(bins, kWarps), kThreads, 0, stream>>>(p, t);
  place_kernel<<<tile_blocks, kThreads, (1 + kWarps) * row, stream>>>(p, t);
  return launched();
}

}  // namespace moe::cuda
