// Movement of rows on the GPU, within its memory.
#include "permute.h"

#include "common/rows.cuh"

namespace moe::cuda {

using namespace row_movement;

namespace {

template <class Format, int kElements, int kLanes>
__global__ void __launch_bounds__(kThreads) permute_kernel(const PermuteParams p, ColumnSplit s) {
  using Vec = Vector<Format, kElements>;
  constexpr int kAtOnce = 4;
  launch_dependent_grids();
  wait_on_dependent_grids();
  for_each_work_item<kLanes>(p.shape.tokens, s, [&](WorkItem item) {
    const Vec* const from = row_of_two_sources<const Vec>(p.x, p.second_x, p.first_tokens, item.t, s.vectors);
    const int32_t* const rows = p.inverse_perm + item.t * p.shape.top_k;
    for (int64_t v = item.begin; v < item.end; v += kAtOnce * kLanes) {
      Vec fragment[kAtOnce];
      load_vectors<kLanes>(fragment, from, v, item.end);
      for (int k = 0; k < p.shape.top_k; ++k) {
        Vec* const to = static_cast<Vec*>(p.rows) + rows[k] * s.vectors;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (v + u * kLanes < item.end) store_streaming(to + v + u * kLanes, fragment[u]);
        }
      }
    }
  });
}

template <class Format, int kElements, int kLanes>
__global__ void __launch_bounds__(kThreads) split_rows_kernel(const SplitRowsParams p, ColumnSplit s) {
  using Vec = Vector<Format, kElements>;
  constexpr int kAtOnce = 4;
  launch_dependent_grids();
  wait_on_dependent_grids();
  for_each_work_item<kLanes>(p.shape.tokens, s, [&](WorkItem item) {
    const Vec* const from = static_cast<const Vec*>(p.rows) + p.inverse_perm[item.t] * s.vectors;
    Vec* const to = row_of_two_sources<Vec>(p.first, p.second, p.first_rows, item.t, s.vectors);
    for (int64_t v = item.begin; v < item.end; v += kAtOnce * kLanes) {
      Vec fragment[kAtOnce];
      load_vectors<kLanes>(fragment, from, v, item.end);
      store_vectors<kLanes>(to, fragment, v, item.end);
    }
  });
}

template <class Format, int kElements, int kLanes>
__global__ void __launch_bounds__(kThreads) unpermute_kernel(const UnpermuteParams p, ColumnSplit s) {
  using Vec = Vector<Format, kElements>;
  using Real = typename Format::Real;
  constexpr int kAtOnce = 2;
  launch_dependent_grids();
  wait_on_dependent_grids();
  const int32_t kept = p.kept_rows == nullptr ? INT32_MAX : *p.kept_rows;
  for_each_work_item<kLanes>(p.shape.tokens, s, [&](WorkItem item) {
    const int64_t slots = item.t * p.shape.top_k;
    const Real* const weights = p.weights == nullptr ? nullptr : static_cast<const Real*>(p.weights) + slots;
    for (int64_t v = item.begin; v < item.end; v += kAtOnce * kLanes) {
      Real sums[kAtOnce][kElements] = {};
#pragma unroll 2
      for (int k = 0; k < p.shape.top_k; ++k) {
        const int32_t row = p.inverse_perm[slots + k];
        if (row >= kept) continue;
        const Real weight = weights == nullptr ? Real(1) : weights[k];
        const Vec* const from = static_cast<const Vec*>(p.rows) + row * s.vectors;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (v + u * kLanes < item.end) {
            const Vec fragment = from[v + u * kLanes];
#pragma unroll
            for (int i = 0; i < kElements; ++i) sums[u][i] += weight * fragment.at(i);
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
  });
}

// The sum over a sub-warp, or over a whole block: in lane 0, in a fixed order.
template <int kLanes, class Real, int kCount>
__device__ void sum_dots(Real (&dots)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) dots[j] = subwarp_sum<kLanes < kWarp ? kLanes : kWarp>(dots[j]);
  if constexpr (kLanes > kWarp) {
    __shared__ Real parts[kLanes / kWarp][kCount];
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (threadIdx.x % kWarp == 0) parts[warp][j] = dots[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      dots[j] = 0;
      for (int w = 0; w < kLanes / kWarp; ++w) dots[j] += parts[w][j];
    }
    __syncthreads();
  }
}

template <class Format, int kElements, int kLanes>
__global__ void __launch_bounds__(kThreads) unpermute_backward_kernel(const UnpermuteBackwardParams p, ColumnSplit s) {
  using Vec = Vector<Format, kElements>;
  using Real = typename Format::Real;
  constexpr int kAtOnce = 2;  // experts that share one load of the gradient
  launch_dependent_grids();
  wait_on_dependent_grids();
  const int32_t kept = p.kept_rows == nullptr ? INT32_MAX : *p.kept_rows;
  const int64_t stride = int64_t(gridDim.x) * (kThreads / kLanes);
  const int64_t first = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t warp_first = first - threadIdx.x % kWarp / kLanes;
  const int lane = threadIdx.x % kLanes;
  for (int64_t ahead = 0; warp_first + ahead < p.shape.tokens; ahead += stride) {
    const bool active = first + ahead < p.shape.tokens;  // all lanes of the warp take part in the shuffles
    const int64_t t = active ? first + ahead : 0;
    const Vec* const grad = static_cast<const Vec*>(p.grad_y) + t * s.vectors;
    for (int k0 = 0; k0 < p.shape.top_k; k0 += kAtOnce) {
      const int64_t slot = t * p.shape.top_k + k0;
      const Vec* from[kAtOnce];
      Vec* to[kAtOnce];
      Real weights[kAtOnce], dots[kAtOnce] = {};
      bool here[kAtOnce], live[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        here[j] = active && k0 + j < p.shape.top_k;
        const int32_t row = here[j] ? p.inverse_perm[slot + j] : 0;
        live[j] = here[j] && row < kept;
        weights[j] = live[j] ? static_cast<const Real*>(p.weights)[slot + j] : Real(0);
        from[j] = static_cast<const Vec*>(p.rows) + row * s.vectors;
        to[j] = static_cast<Vec*>(p.grad_rows) + row * s.vectors;
      }
#pragma unroll 2
      for (int64_t v = lane; v < s.vectors; v += kLanes) {
        const Vec g = grad[v];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          Vec out;
          if (live[j]) {
            const Vec row = from[j][v];
#pragma unroll
            for (int i = 0; i < kElements; ++i) dots[j] += g.at(i) * row.at(i);
          }
#pragma unroll
          for (int i = 0; i < kElements; ++i) out.set(i, live[j] ? weights[j] * g.at(i) : Real(0));
          if (here[j]) to[j][v] = out;
        }
      }
      sum_dots<kLanes>(dots);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (here[j] && lane == 0) static_cast<Real*>(p.grad_weights)[slot + j] = dots[j];
      }
    }
  }
}

}  // namespace

Status permute(const PermuteParams& p, Stream stream) {
  if (p.shape.width == 0 || p.shape.tokens == 0) return {};
  return launch(p, {p.x, p.second_x, p.rows}, true, stream, [](auto format, auto elements, auto lanes) {
    return permute_kernel<decltype(format), elements, lanes>;
  });
}

Status split_rows(const SplitRowsParams& p, Stream stream) {
  if (p.shape.width == 0 || p.shape.tokens == 0) return {};
  return launch(p, {p.rows, p.first, p.second}, true, stream, [](auto format, auto elements, auto lanes) {
    return split_rows_kernel<decltype(format), elements, lanes>;
  });
}

Status unpermute(const UnpermuteParams& p, Stream stream) {
  if (p.shape.width == 0 || p.shape.tokens == 0) return {};
  return launch(p, {p.rows, p.y}, true, stream, [](auto format, auto elements, auto lanes) {
    return unpermute_kernel<decltype(format), elements, lanes>;
  });
}

Status unpermute_backward(const UnpermuteBackwardParams& p, Stream stream) {
  if (p.shape.tokens == 0) return {};  // a width of 0 has gradients of 0
  return launch(p, {p.grad_y, p.rows, p.grad_rows}, false, stream, [](auto format, auto elements, auto lanes) {
    return unpermute_backward_kernel<decltype(format), elements, lanes>;
  });
}

}  // namespace moe::cuda
