// The sinkhorn kernel: all iterations in one launch.
//
// A team of blocks shares the rows: a cluster, where the matrix fits its registers, or a cooperative grid. A row
// belongs to a group of kLanes lanes, kPerLane columns each. The matrix exp(scores + potential) is kept in registers
// (kRows rows a group), and an iteration only multiplies: row sums, then column sums over the team, from which
// every block works out the same factors of the columns. Factors that grow out of the range where fp32 is safe are
// moved into the potentials, in the log domain, and the matrix is made anew (Schmitzer, "Stabilized sparse scaling
// algorithms for entropy regularized transport problems", 2019). With kRows = 0 the matrix is too large to keep and is
// made anew in every iteration.
//
// Sums are taken in one order everywhere: the same bits on every run, in every block.
#pragma once

#include "sinkhorn_sums.cuh"

namespace moe::cuda::sinkhorn_detail {

constexpr float kSafe = 1e15f;  // factors stay in [1 / kSafe, kSafe]

template <class Format, int kLanes, int kPerLane, int kRows>
__global__ void __launch_bounds__(kThreads) sinkhorn_kernel(const SinkhornLaunch p) {
  extern __shared__ __align__(16) float shared[];
  constexpr int kGroups = kThreads / kLanes;
  constexpr bool kKept = kRows > 0;
  constexpr int kAhead = sizeof(RawLogits<Format, kPerLane>) <= 32 ? 4 : 1;  // rows at a time
  using RowsOf = Rows<Format, kLanes, kPerLane, kAhead>;
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
  const int column = lane * kPerLane;  // the first of this lane's
  bool shifted = !kKept;               // potentials may be large
  const auto place_of = [&](int64_t round) { return first + round * groups; };
  // Calls use(rows, their logits, the number of the first) for the group's rows, kAhead at a time; the next ones are on
  // their way meanwhile. The loop stays rolled: the code must fit the instruction cache.
  const auto each_rows = [&](const auto& use) {
    RawLogits<Format, kPerLane> next[kAhead];
    const auto load = [&](int64_t round) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (round + a < rounds) next[a].load(p, min(place_of(round + a), p.tokens - 1), column);
      }
    };
    float potential[kPerLane];
    copy_vectors<kPerLane>(columns.potential + column, potential);
    load(0);
#pragma unroll 1
    for (int64_t round = 0; round < rounds; round += kAhead) {
      RawLogits<Format, kPerLane> raw[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) raw[a] = next[a];
      load(round + kAhead);
      RowsOf rows;
      rows.set(raw, p.sharpness, potential, shifted);
      use(rows, raw, round);
    }
  };
  const auto takes_part = [&](int64_t round) { return round < rounds && place_of(round) < p.tokens; };
  // Through shared memory, a thread to itself: only the copy needs the registers' numbers.
  const auto make_kept = [&] {
    int live = 0;
    each_rows([&](const RowsOf& rows, const auto&, int64_t round) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        float values[kPerLane];
        live += rows.exponentials(a, takes_part(round + a), values);
        if (round + a >= rounds) continue;
#pragma unroll
        for (int v = 0; v < kPerLane; ++v) {
          columns.staged[(int(round + a) * kPerLane + v) * kThreads + threadIdx.x] = values[v];
        }
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
    copy_vectors<kPerLane>(columns.factor + column, factors);
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
      each_rows([&](const RowsOf& rows, const auto&, int64_t round) {
        float values[kAhead][kPerLane];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const bool counts = rows.exponentials(a, takes_part(round + a), values[a]);
          live += i == 0 && counts;
        }
        add(values);
      });
    }
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) sums[v] *= factors[v];

    int held;
    const int offset = sum_over_groups<kLanes>(sums, held);
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      if (v < held) columns.parts[warp * Columns<kWidth>::kPart + column + offset + v] = sums[v];
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
      const float* const parts = columns.parts + helper.mine * Columns<kWidth>::kPart + e;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; w += Help::kMany) sum += parts[w * Columns<kWidth>::kPart];
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
      shifted = true;
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
  each_rows([&](const RowsOf& rows, const auto& raw, int64_t round) {
    float sums[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      sums[a] = 0;
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) sums[a] += exp_of(rows.z[a][v]);
    }
    group_sum_each<kLanes>(sums);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const float log_sum = rows.broken[a] ? NAN : rows.empty[a] ? 0.0f : logf(sums[a]);
      float scores[kPerLane];
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        // A mask stays one, a huge difference does not become one; fmaxf would lose a NaN.
        const float score = rows.z[a][v] - log_sum;
        scores[v] = score == -INFINITY && raw[a].at(v) != -INFINITY ? -FLT_MAX : score;
      }
      if (!takes_part(round + a)) continue;
      write(p.scores + place_of(round + a) * p.experts + column, p.experts - column, p.aligned, scores);
    }
  });
}

}  // namespace moe::cuda::sinkhorn_detail
