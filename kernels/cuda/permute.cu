// Movement of rows on the GPU. A group of lanes takes a token, or a slice of its columns where tokens are few, and
// moves it in vectors of 16 bytes, or in single elements where rows are not aligned to that.
#include "permute.h"

#include <algorithm>

#include "groups.cuh"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;
constexpr int kWarpsPerSm = 32;  // enough to keep the memory busy

template <class Format, int kElements>
struct alignas(sizeof(typename Format::Bits) * kElements) Vector {
  using Real = typename Format::Real;
  typename Format::Bits bits[kElements];

  __device__ Real at(int i) const { return Format::to_real(bits[i]); }
  __device__ void set(int i, Real value) { bits[i] = Format::from_real(value); }
};

// Written with the hint to leave the cache first: the tokens are read again sooner.
template <class Vec>
__device__ void store_last(Vec* to, const Vec& value) {
  if constexpr (sizeof(Vec) == 16) {
    int4 words;
    memcpy(&words, &value, 16);
    __stcs(reinterpret_cast<int4*>(to), words);
  } else {
    *to = value;
  }
}

// The vectors that one group moves: of token `t`, from `begin` in steps of kLanes to `end`.
struct Share {
  int64_t t, begin, end;
};

struct Slicing {
  int64_t vectors;  // of a row
  int64_t slices;   // of a row, each to a group
  int64_t length;   // vectors of a slice
};

template <int kLanes, class Use>
__device__ void each_share(int64_t tokens, const Slicing& s, const Use& use) {
  constexpr int kGroups = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t stride = int64_t(gridDim.x) * kGroups, total = tokens * s.slices;
  for (int64_t i = int64_t(blockIdx.x) * kGroups + threadIdx.x / kLanes; i < total; i += stride) {
    const int64_t t = s.slices == 1 ? i : i / s.slices, slice = s.slices == 1 ? 0 : i % s.slices;
    use(Share{t, slice * s.length + lane, min((slice + 1) * s.length, s.vectors)});
  }
}

template <class Format, int kElements, int kLanes>
__global__ void __launch_bounds__(kThreads) permute_kernel(const PermuteParams p, Slicing s) {
  using Vec = Vector<Format, kElements>;
  constexpr int kAtOnce = 4;
  let_next_start();
  wait_for_previous();
  each_share<kLanes>(p.shape.tokens, s, [&](Share share) {
    const Vec* const from = static_cast<const Vec*>(p.x) + share.t * s.vectors;
    const int32_t* const rows = p.inverse_perm + share.t * p.shape.top_k;
    for (int64_t v = share.begin; v < share.end; v += kAtOnce * kLanes) {
      Vec held[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (v + u * kLanes < share.end) held[u] = from[v + u * kLanes];
      }
      for (int k = 0; k < p.shape.top_k; ++k) {
        Vec* const to = static_cast<Vec*>(p.rows) + rows[k] * s.vectors;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (v + u * kLanes < share.end) store_last(to + v + u * kLanes, held[u]);
        }
      }
    }
  });
}

template <class Format, int kElements, int kLanes>
__global__ void __launch_bounds__(kThreads) unpermute_kernel(const UnpermuteParams p, Slicing s) {
  using Vec = Vector<Format, kElements>;
  using Real = typename Format::Real;
  constexpr int kAtOnce = 2;
  let_next_start();
  wait_for_previous();
  const int32_t kept = p.kept_rows == nullptr ? INT32_MAX : *p.kept_rows;
  each_share<kLanes>(p.shape.tokens, s, [&](Share share) {
    const int64_t slots = share.t * p.shape.top_k;
    const Real* const weights = p.weights == nullptr ? nullptr : static_cast<const Real*>(p.weights) + slots;
    for (int64_t v = share.begin; v < share.end; v += kAtOnce * kLanes) {
      Real sums[kAtOnce][kElements] = {};
#pragma unroll 2
      for (int k = 0; k < p.shape.top_k; ++k) {
        const int32_t row = p.inverse_perm[slots + k];
        if (row >= kept) continue;
        const Real weight = weights == nullptr ? Real(1) : weights[k];
        const Vec* const from = static_cast<const Vec*>(p.rows) + row * s.vectors;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (v + u * kLanes < share.end) {
            const Vec held = from[v + u * kLanes];
#pragma unroll
            for (int i = 0; i < kElements; ++i) sums[u][i] += weight * held.at(i);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        Vec sum;
#pragma unroll
        for (int i = 0; i < kElements; ++i) sum.set(i, sums[u][i]);
        if (v + u * kLanes < share.end) static_cast<Vec*>(p.y)[share.t * s.vectors + v + u * kLanes] = sum;
      }
    }
  });
}

// The sum over a group of lanes, or over a whole block: in lane 0, and in one order.
template <int kLanes, class Real, int kCount>
__device__ void sum_dots(Real (&dots)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) dots[j] = group_sum<kLanes < kWarp ? kLanes : kWarp>(dots[j]);
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
__global__ void __launch_bounds__(kThreads) unpermute_backward_kernel(const UnpermuteBackwardParams p, Slicing s) {
  using Vec = Vector<Format, kElements>;
  using Real = typename Format::Real;
  constexpr int kAtOnce = 2;  // experts that share one reading of the gradient
  let_next_start();
  wait_for_previous();
  const int32_t kept = p.kept_rows == nullptr ? INT32_MAX : *p.kept_rows;
  const int64_t groups = int64_t(gridDim.x) * (kThreads / kLanes);
  const int64_t first = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t warp_first = first - threadIdx.x % kWarp / kLanes;
  const int lane = threadIdx.x % kLanes;
  for (int64_t ahead = 0; warp_first + ahead < p.shape.tokens; ahead += groups) {
    const bool active = first + ahead < p.shape.tokens;  // all lanes of the warp stay: the sums name them
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

Slicing slice_rows(const RowShape& shape, int64_t vectors, int lanes, bool sliced) {
  Slicing s{vectors, 1, vectors};
  if (sliced) {
    const int64_t wanted = ceil_div<int64_t>(int64_t(multiprocessors()) * kWarpsPerSm, shape.tokens);
    s.length = ceil_div(vectors, std::clamp<int64_t>(vectors / lanes, 1, wanted));
    s.slices = ceil_div(vectors, s.length);
  }
  return s;
}

// Launches kernel_for(format, elements of a vector, lanes of a group). `moved` are the addresses of rows.
template <class Params, class KernelFor>
Status launch(const Params& p, std::initializer_list<const void*> moved, bool sliced, Stream stream,
              const KernelFor& kernel_for) {
  const RowShape& shape = p.shape;
  if (const Status status = check_sizes(shape); !status.ok()) return status;
  if (shape.tokens == 0) return {};
  return dispatch(shape.dtype, [&](auto format) -> Status {
    constexpr int kWide = 16 / int(sizeof(typename decltype(format)::Bits));
    const bool aligned = shape.width % kWide == 0 && std::all_of(moved.begin(), moved.end(), [](const void* at) {
                           return reinterpret_cast<uintptr_t>(at) % 16 == 0;
                         });
    const auto with = [&](auto elements, auto lanes) {
      const Slicing s = slice_rows(shape, shape.width / elements, lanes, sliced);
      const int64_t blocks = ceil_div<int64_t>(shape.tokens * s.slices, kThreads / lanes);
      launch_early(kernel_for(format, elements, lanes), unsigned(std::min(blocks, kMaxBlocks)), kThreads, 0, stream, p,
                   s);
    };
    const auto with_lanes = [&](auto elements) {
      // A row cannot be sliced where it is summed up: with few tokens a block takes each.
      const bool few = !sliced && shape.tokens < int64_t(multiprocessors()) * kThreads / kWarp;
      if (few && shape.width / elements >= kThreads) with(elements, std::integral_constant<int, kThreads>{});
      else if (shape.width / elements >= 32) with(elements, std::integral_constant<int, 32>{});
      else with(elements, std::integral_constant<int, 8>{});
    };
    if (aligned) with_lanes(std::integral_constant<int, kWide>{});
    else with_lanes(std::integral_constant<int, 1>{});
    return launched();
  });
}

}  // namespace

Status permute(const PermuteParams& p, Stream stream) {
  if (p.shape.width == 0) return {};
  return launch(p, {p.x, p.rows}, true, stream, [](auto format, auto elements, auto lanes) {
    return permute_kernel<decltype(format), elements, lanes>;
  });
}

Status unpermute(const UnpermuteParams& p, Stream stream) {
  if (p.shape.width == 0) return {};
  return launch(p, {p.rows, p.y}, true, stream, [](auto format, auto elements, auto lanes) {
    return unpermute_kernel<decltype(format), elements, lanes>;
  });
}

Status unpermute_backward(const UnpermuteBackwardParams& p, Stream stream) {  // a width of 0 has gradients of 0
  return launch(p, {p.grad_y, p.rows, p.grad_rows}, false, stream, [](auto format, auto elements, auto lanes) {
    return unpermute_backward_kernel<decltype(format), elements, lanes>;
  });
}

}  // namespace moe::cuda
