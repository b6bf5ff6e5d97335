// The sinkhorn kernel: all iterations in one launch.
//
// The blocks of a cluster, where the matrix fits their registers, or of a cooperative grid share the rows. A row belongs
// to a sub-warp of kLanes lanes, kPerLane columns each. The matrix exp(scores + potential) is kept in registers (kRows
// rows per sub-warp), and an iteration only multiplies: row sums, then an all-reduce of the column sums, from which every
// block computes the same factors of the columns. Factors that leave the range where fp32 is safe are absorbed into the
// potentials, in the log domain, and the matrix is recomputed (Schmitzer, "Stabilized sparse scaling
// algorithms for entropy regularized transport problems", 2019). With kRows = 0 the matrix is too large to keep and is
// recomputed in every iteration.
//
// All sums have a fixed order: the same bits on every run, in every block.
#pragma once

#include "sinkhorn/all_reduce.cuh"

namespace moe::cuda::sinkhorn_detail {

constexpr float kSafe = 1e15f;  // factors stay in [1 / kSafe, kSafe]

template <class Format, int kLanes, int kPerLane, int kRows, template <int> class AllReduce>
__global__ void __launch_bounds__(kThreads) sinkhorn_kernel(const SinkhornLaunch p) {
  extern __shared__ __align__(16) float shared[];
  constexpr int kGroups = kThreads / kLanes;
  constexpr bool kKept = kRows > 0;
  using Raw = RawLogits<Format, kLanes, kPerLane>;
  constexpr bool kFull = kRows * kPerLane > 64;  // so many are kept that few registers are left
  constexpr int kTogether = kPerLane > 16 ? 1 : kFull || !kKept ? 2 : 4;  // rows side by side
  constexpr int kLoaded = kFull ? kRows / 2 : kKept ? kRows : kTogether;  // rows on their way at once
  constexpr bool kHeld = kKept && !kFull && sizeof(typename Format::Bits) == 2;  // logits wait in registers too
  using Offsets = RowOffsets<kLanes, kPerLane, kTogether>;
  constexpr int kWidth = kLanes * kPerLane;
  const Columns<kWidth> columns(shared);
  const int warp = threadIdx.x / kWarp;
  const int64_t groups = int64_t(gridDim.x) * kGroups;
  const int64_t first = int64_t(blockIdx.x) * kGroups + threadIdx.x / kLanes;
  const int64_t rounds = kKept ? p.rows : ceil_div(p.tokens, groups);

  __shared__ DsmemMailbox::Barriers barriers;
  const AllReduce<kWidth> all_reduce(p, columns, barriers);
  __shared__ int rows_here;  // that have a part
  // One plus the last iteration that needed a rescale, and that had not converged.
  struct alignas(8) StatusFlags {
    int needs_rescale, unconverged;
  };
  __shared__ StatusFlags status;
  for (int e = threadIdx.x; e < kWidth; e += kThreads) {
    columns.potential[e] = 0;
    columns.factor[e] = e < p.experts ? 1.0f : 0.0f;
  }
  if (threadIdx.x == 0) rows_here = status.needs_rescale = status.unconverged = 0;
  __syncthreads();
  launch_dependent_grids();
  wait_on_dependent_grids();
  all_reduce.begin();

  bool shifted = !kKept;  // potentials may be large
  const auto place_of = [&](int64_t round) { return first + round * groups; };
  const auto takes_part = [&](int64_t round) { return round < rounds && place_of(round) < p.tokens; };
  const auto load = [&](Raw* raw, int64_t begin, int count) {
    const auto load_each = [&](auto aligned) {
#pragma unroll
      for (int a = 0; a < count; ++a) {
        if (begin + a < rounds) raw[a].template load<aligned.value>(p, min(place_of(begin + a), p.tokens - 1));
      }
    };
    if (p.aligned) load_each(std::true_type{});
    else load_each(std::false_type{});
  };
  Raw held[kHeld ? kRows : 1];
  Offsets kept_offsets[kKept ? kRows / kTogether : 1];
  if constexpr (kHeld) load(held, 0, kRows);
  // Calls use(offsets, logits, the number of the first) for the group's rows, kTogether at a time. Where rows are not
  // kept the next ones are on their way meanwhile, and the loop stays rolled.
  const auto each_rows = [&](const auto& use) {
    if constexpr (kKept) {
#pragma unroll
      for (int begin = 0; begin < kRows; begin += kLoaded) {
        if (begin >= rounds) break;
        Raw loaded[kHeld ? 1 : kLoaded];
        if constexpr (!kHeld) load(loaded, begin, kLoaded);
#pragma unroll
        for (int r = 0; r < kLoaded; r += kTogether) {
          const int round = begin + r;
          if (round < rounds) use(kept_offsets[round / kTogether], kHeld ? held + round : loaded + r, round);
        }
      }
    } else {
      Raw next[kLoaded];
      load(next, 0, kLoaded);
#pragma unroll 1
      for (int64_t round = 0; round < rounds; round += kTogether) {
        Raw raw[kTogether];
#pragma unroll
        for (int a = 0; a < kTogether; ++a) raw[a] = next[a];
        load(next, round + kTogether, kLoaded);
        use(kept_offsets[0], raw, round);
      }
    }
  };
  // exp2(z + kLift) of rows, with the potentials as they are now; how many have a part.
  const auto make_values = [&](Offsets& offsets, const Raw* raw, int64_t round, const float (&potential)[kPerLane],
                               float (*values)[kPerLane]) {
    offsets.find(raw, [&](int a) { return takes_part(round + a); }, p.sharpness, potential, shifted);
    return offsets.exponentials(raw, p.sharpness, potential, shifted, values);
  };

  using Lanes = ColumnLanes<kWidth>;
  const Lanes lanes;
  float kept[kKept ? kRows : 1][kPerLane] = {};  // exp2(z + kLift); 0 in rows that have no part
  float target = 0;                              // of a column's sum
  int live = 0;                                  // rows of this group that have a part
  const auto make_kept = [&] {
    float potential[kPerLane];
    read_columns<kLanes>(columns.potential, potential);
    each_rows([&](Offsets& offsets, const Raw* raw, int round) {
      live += make_values(offsets, raw, round, potential, kept + round);
    });
  };
  if constexpr (kKept) make_kept();
  for (int i = 0; i < p.iterations; ++i) {
    float factors[kPerLane], sums[kPerLane] = {};
    read_columns<kLanes>(columns.factor, factors);
    const auto add = [&](const auto& rows) {
      constexpr int kCount = sizeof(rows) / sizeof(rows[0]);
      float scales[kCount];
      scales_of<kLanes>(rows, factors, scales);
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
#pragma unroll
        for (int v = 0; v < kPerLane; ++v) sums[v] += rows[r][v] * scales[r];  // times the factor at the end
      }
    };
    if constexpr (kKept) {
      add(kept);
    } else {
      float potential[kPerLane];
      read_columns<kLanes>(columns.potential, potential);
      each_rows([&](Offsets& offsets, const Raw* raw, int64_t round) {
        float values[kTogether][kPerLane];
        const int have_part = make_values(offsets, raw, round, potential, values);
        live += i == 0 ? have_part : 0;
        add(values);
      });
    }
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) sums[v] *= factors[v];

    int share;
    const int offset = sum_over_groups<kLanes>(sums, share);
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      if (v < share) columns.parts[warp * Columns<kWidth>::kPart + column_of<kLanes>(offset + v)] = sums[v];
    }
    if (i == 0) {
      const int of_warp = __reduce_add_sync(kFullMask, threadIdx.x % kLanes == 0 ? live : 0);
      if (threadIdx.x % kWarp == 0) atomicAdd(&rows_here, of_warp);
    }
    __syncthreads();
    all_reduce.contribute(rows_here, i, lanes);

    if (i == 0) target = all_reduce.rows(lanes) / float(p.experts);
    const float safe_target = fmaxf(target, FLT_MIN);
    bool unconverged = false, needs_rescale = !kKept;
    float before[Lanes::kColumns], new_factor[Lanes::kColumns], found[Lanes::kColumns];  // factors, and sums
#pragma unroll
    for (int c = 0; c < Lanes::kColumns; ++c) {
      const int e = lanes.column(c);
      const float sum = all_reduce.column(e, i, lanes);
      const bool inside = e < p.experts;
      unconverged |= inside && sum > 0 && p.tolerance > 0 && fabsf(sum - target) > p.tolerance * target;
      before[c] = columns.factor[e];
      found[c] = fmaxf(sum, FLT_MIN);
      new_factor[c] = before[c] * __fdividef(safe_target, found[c]);
      needs_rescale |= inside && !(new_factor[c] < kSafe && new_factor[c] > 1 / kSafe);
    }
    __syncwarp();  // all lanes of a column have read the old ones
#pragma unroll
    for (int c = 0; c < Lanes::kColumns; ++c) {
      if (lanes.column(c) < p.experts) columns.factor[lanes.column(c)] = new_factor[c];
    }
    if (needs_rescale) status.needs_rescale = i + 1;
    if (unconverged) status.unconverged = i + 1;
    __syncthreads();
    const StatusFlags seen = status;
    if (__builtin_expect(seen.needs_rescale == i + 1, false)) {
      shifted = true;
#pragma unroll
      for (int c = 0; c < Lanes::kColumns; ++c) {
        const int e = lanes.column(c);
        if (e >= p.experts || lanes.mine != 0) continue;
        columns.potential[e] += log2f(before[c]) + (log2f(safe_target) - log2f(found[c]));
        columns.factor[e] = 1;
      }
      __syncthreads();
      if constexpr (kKept) make_kept();
    }
    if (p.tolerance > 0 && seen.unconverged != i + 1) break;
  }

  // Scores are natural logarithms.
  for (int e = threadIdx.x; e < kWidth; e += kThreads) {
    columns.parts[e] = (columns.potential[e] + log2f(columns.factor[e])) * kLn2;
  }
  __syncthreads();
  float potential[kPerLane], added[kPerLane], factors[kPerLane];
  read_columns<kLanes>(columns.potential, potential);
  read_columns<kLanes>(columns.parts, added);
  read_columns<kLanes>(columns.factor, factors);
  const float sharpness = 1 / p.temperature;
  float kept_scales[kKept ? kRows : 1];
  if constexpr (kKept) scales_of<kLanes>(kept, factors, kept_scales);
  each_rows([&](Offsets& offsets, const Raw* raw, auto round) {
    float scales[kTogether];
    if constexpr (kKept) {
#pragma unroll
      for (int a = 0; a < kTogether; ++a) scales[a] = kept_scales[round + a];
    } else {
      float values[kTogether][kPerLane];
      make_values(offsets, raw, round, potential, values);
      scales_of<kLanes>(values, factors, scales);
    }
#pragma unroll
    for (int a = 0; a < kTogether; ++a) {
      const float of_row = (log2f(scales[a]) + kLift - offsets.top[a]) * kLn2;
      float scores[kPerLane], lowest = INFINITY;
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        scores[v] = offsets.z(raw[a], a, v, sharpness, added) + of_row;
        lowest = fminf(lowest, scores[v]);
      }
      if (lowest == -INFINITY) {  // a mask stays one, a huge difference does not become one
#pragma unroll
        for (int v = 0; v < kPerLane; ++v) {
          if (scores[v] == -INFINITY && raw[a].at(v) != -INFINITY) scores[v] = -FLT_MAX;
        }
      }
      if (!takes_part(round + a)) continue;
      if (p.aligned) write_row<kLanes, true>(p, place_of(round + a), scores);
      else write_row<kLanes, false>(p, place_of(round + a), scores);
    }
  });
}

}  // namespace moe::cuda::sinkhorn_detail
