// Movement of rows: a sub-warp takes a token, or a slice of its columns where tokens are few, in vectors of 16 bytes, or
// in single elements where rows are not aligned.
#pragma once

#include <algorithm>

#include "common/subwarp.cuh"
#include "permute.h"

namespace moe::cuda::row_movement {

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

// Streaming store (evict first): the tokens are read again sooner.
template <class Vec>
__device__ void store_streaming(Vec* to, const Vec& value) {
  if constexpr (sizeof(Vec) == 16) {
    int4 words;
    memcpy(&words, &value, 16);
    __stcs(reinterpret_cast<int4*>(to), words);
  } else {
    *to = value;
  }
}

// Row `row` of two tables, the second after the first_rows of the first.
template <class Vec, class Address>
__device__ Vec* row_of_two_sources(Address first, Address second, int64_t first_rows, int64_t row, int64_t vectors) {
  const bool in_second = row >= first_rows;
  return static_cast<Vec*>(in_second ? second : first) + (row - (in_second ? first_rows : 0)) * vectors;
}

// The next vectors of a work item, all loaded before the first one is used.
template <int kLanes, class Vec, int kAtOnce>
__device__ void load_vectors(Vec (&fragment)[kAtOnce], const Vec* from, int64_t v, int64_t end) {
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    if (v + u * kLanes < end) fragment[u] = from[v + u * kLanes];
  }
}

template <int kLanes, class Vec, int kAtOnce>
__device__ void store_vectors(Vec* to, const Vec (&fragment)[kAtOnce], int64_t v, int64_t end) {
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    if (v + u * kLanes < end) to[v + u * kLanes] = fragment[u];
  }
}

// The vectors that one sub-warp moves: of token `t`, from `begin` in steps of kLanes to `end`.
struct WorkItem {
  int64_t t, begin, end;
};

struct ColumnSplit {
  int64_t vectors;  // of a row
  int64_t slices;   // per row, one per sub-warp
  int64_t length;   // vectors of a slice
};

template <int kLanes, class Use>
__device__ void for_each_work_item(int64_t tokens, const ColumnSplit& s, const Use& use) {
  constexpr int kGroups = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t stride = int64_t(gridDim.x) * kGroups, total = tokens * s.slices;
  for (int64_t i = int64_t(blockIdx.x) * kGroups + threadIdx.x / kLanes; i < total; i += stride) {
    const int64_t t = s.slices == 1 ? i : i / s.slices, slice = s.slices == 1 ? 0 : i % s.slices;
    use(WorkItem{t, slice * s.length + lane, min((slice + 1) * s.length, s.vectors)});
  }
}

inline ColumnSplit split_columns(const RowShape& shape, int64_t vectors, int lanes, bool sliced) {
  ColumnSplit s{vectors, 1, vectors};
  if (sliced && vectors > 0 && shape.tokens > 0) {
    const int64_t wanted = ceil_div<int64_t>(int64_t(num_sms()) * kWarpsPerSm, shape.tokens);
    s.length = ceil_div(vectors, std::clamp<int64_t>(vectors / lanes, 1, wanted));
    s.slices = ceil_div(vectors, s.length);
  }
  return s;
}

// Launches kernel_for(format, elements per vector, lanes per sub-warp). `moved` are the addresses of rows. At least one
// block, as some kernels do more than move rows.
template <class Params, class KernelFor>
Status launch(const Params& p, std::initializer_list<const void*> moved, bool sliced, Stream stream,
              const KernelFor& kernel_for) {
  const RowShape& shape = p.shape;
  if (const Status status = check_sizes(shape); !status.ok()) return status;
  return dispatch_dtype(shape.dtype, [&](auto format) -> Status {
    constexpr int kWide = 16 / int(sizeof(typename decltype(format)::Bits));
    const bool aligned = shape.width % kWide == 0 && std::all_of(moved.begin(), moved.end(), [](const void* at) {
                           return reinterpret_cast<uintptr_t>(at) % 16 == 0;
                         });
    const auto with = [&](auto elements, auto lanes) {
      const ColumnSplit s = split_columns(shape, shape.width / elements, lanes, sliced);
      const int64_t blocks = ceil_div<int64_t>(shape.tokens * s.slices, kThreads / lanes);
      launch_pdl(kernel_for(format, elements, lanes), unsigned(std::clamp<int64_t>(blocks, 1, kMaxBlocks)), kThreads,
                   0, stream, p, s);
    };
    const auto with_lanes = [&](auto elements) {
      // A row that is reduced cannot be sliced: with few tokens a block takes each.
      const bool few = !sliced && shape.tokens < int64_t(num_sms()) * kThreads / kWarp;
      if (few && shape.width / elements >= kThreads) with(elements, std::integral_constant<int, kThreads>{});
      else if (shape.width / elements >= 32) with(elements, std::integral_constant<int, 32>{});
      else with(elements, std::integral_constant<int, 8>{});
    };
    if (aligned) with_lanes(std::integral_constant<int, kWide>{});
    else with_lanes(std::integral_constant<int, 1>{});
    return last_error();
  });
}

}  // namespace moe::cuda::row_movement
