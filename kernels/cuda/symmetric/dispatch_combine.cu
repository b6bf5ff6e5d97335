// Dispatch: rows stored into other ranks' memory. Combine: sums of rows loaded from it. Accesses over the link are as wide
// as possible and many in flight; a token's own row is read once, and every sum has a fixed order.
#include "common/rows.cuh"
#include "symmetric/signals.cuh"

namespace moe::cuda {

using namespace row_movement;

namespace {

struct Destination {
  int rank;  // -1: dropped
  int64_t row;
};

__device__ __forceinline__ Destination destination_of(const Route& r, int64_t slot) {
  const int32_t e = r.expert_ids[slot];
  if (uint32_t(e) >= uint32_t(r.experts)) return {-1, 0};
  return {e / r.local_experts, int64_t(r.dst_offset[e]) + r.inverse_perm[slot]};
}

// Bypasses L1, which does not see what other ranks write.
template <class T>
__device__ __forceinline__ T load_uncached(const T* at) {
  using Word = std::conditional_t<sizeof(T) == 16, int4, std::conditional_t<sizeof(T) == 8, long long,
               std::conditional_t<sizeof(T) == 4, int, short>>>;
  static_assert(sizeof(T) == sizeof(Word), "load_uncached: 2, 4, 8 or 16 bytes");
  return bit_cast<T>(__ldcg(reinterpret_cast<const Word*>(at)));
}

// Calls use(slot) for a token's slots, shared by the lanes of the sub-warp that has its first slice.
template <int kLanes, class Use>
__device__ void for_each_slot(const WorkItem& item, int top_k, const Use& use) {
  for (int64_t k = item.begin; k < top_k && item.begin < kLanes; k += kLanes) use(item.t * top_k + k);
}

// The last block to arrive signals the other ranks that all rows are stored, and waits for their signals.
__device__ void last_block_barrier(const Signals& s, int steps) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();  // the block's rows before its arrival
    last = atomicAdd(s.state + 1, 1u) == gridDim.x - 1;
    if (last) s.state[1] = 0;
    __threadfence_system();  // all blocks' arrivals before the flags
  }
  __syncthreads();
  if (last) arrive_and_wait(s, steps, next_epoch(s, steps));
}

template <class Format, int kElements, int kLanes>
__global__ void __launch_bounds__(kThreads, 4) dispatch_kernel(const DispatchParams p, ColumnSplit s) {
  using Vec = Vector<Format, kElements>;
  using Real = typename Format::Real;
  constexpr int kAtOnce = 4;
  wait_on_dependent_grids();
  for_each_work_item<kLanes>(p.shape.tokens, s, [&](WorkItem item) {
    const Vec* const from = static_cast<const Vec*>(p.x) + item.t * s.vectors;
    for (int64_t v = item.begin; v < item.end; v += kAtOnce * kLanes) {
      Vec fragment[kAtOnce];
      load_vectors<kLanes>(fragment, from, v, item.end);
      for (int k = 0; k < p.shape.top_k; ++k) {
        const Destination destination = destination_of(p.route, item.t * p.shape.top_k + k);
        if (destination.rank < 0) continue;
        Vec* const to = reinterpret_cast<Vec*>(p.rows[destination.rank]) + destination.row * s.vectors;
        store_vectors<kLanes>(to, fragment, v, item.end);
      }
    }
    if (p.weights == nullptr) return;
    for_each_slot<kLanes>(item, p.shape.top_k, [&](int64_t slot) {
      const Destination destination = destination_of(p.route, slot);
      if (destination.rank < 0) return;
      reinterpret_cast<Real*>(p.row_weights[destination.rank])[destination.row] = static_cast<const Real*>(p.weights)[slot];
    });
  });
  last_block_barrier(p.signals, p.steps);
}

template <class Format, int kElements, int kLanes>
__global__ void __launch_bounds__(kThreads, 4) combine_kernel(const CombineParams p, ColumnSplit s) {
  using Vec = Vector<Format, kElements>;
  using Real = typename Format::Real;
  constexpr int kAtOnce = 2, kSlots = 2;  // vectors per row, and rows, in flight
  launch_dependent_grids();
  wait_on_dependent_grids();
  for_each_work_item<kLanes>(p.shape.tokens, s, [&](WorkItem item) {
    for (int64_t v = item.begin; v < item.end; v += kAtOnce * kLanes) {
      Real sums[kAtOnce][kElements] = {};
      for (int first = 0; first < p.shape.top_k; first += kSlots) {
        Vec fragment[kSlots][kAtOnce];
        bool live[kSlots];
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
          const int k = first + j;
          const Destination destination =
              k < p.shape.top_k ? destination_of(p.route, item.t * p.shape.top_k + k) : Destination{-1, 0};
          live[j] = destination.rank >= 0;
          if (!live[j]) continue;
          const Vec* const from = reinterpret_cast<const Vec*>(p.rows[destination.rank]) + destination.row * s.vectors;
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u) {
            if (v + u * kLanes < item.end) fragment[j][u] = load_uncached(from + v + u * kLanes);
          }
        }
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
          if (!live[j]) continue;
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
            for (int i = 0; i < kElements; ++i) sums[u][i] += fragment[j][u].at(i);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        Vec sum;
#pragma unroll
        for (int i = 0; i < kElements; ++i) sum.set(i, sums[u][i]);
        if (v + u * kLanes < item.end) static_cast<Vec*>(p.y)[item.t * s.vectors + v + u * kLanes] = sum;
      }
    }
    if (p.row_scalars == nullptr) return;
    for_each_slot<kLanes>(item, p.shape.top_k, [&](int64_t slot) {
      const Destination destination = destination_of(p.route, slot);
      Real scalar = 0;
      if (destination.rank >= 0) {
        scalar = load_uncached(reinterpret_cast<const Real*>(p.row_scalars[destination.rank]) + destination.row);
      }
      static_cast<Real*>(p.scalars)[slot] = scalar;
    });
  });
}

}  // namespace

Status dispatch(const DispatchParams& p, Stream stream) {
  if (const Status status = check_sizes(p.signals); !status.ok()) return status;
  return launch(p, {p.x}, true, stream, [](auto format, auto elements, auto lanes) {
    return dispatch_kernel<decltype(format), elements, lanes>;
  });
}

Status combine(const CombineParams& p, Stream stream) {
  if (p.shape.tokens == 0) return {};
  return launch(p, {p.y}, true, stream, [](auto format, auto elements, auto lanes) {
    return combine_kernel<decltype(format), elements, lanes>;
  });
}

}  // namespace moe::cuda
