// The sinkhorn kernel: all iterations in one launch.
//
// The blocks of a cluster, where the matrix fits their registers, or of a cooperative grid share the rows. A row belongs
// to a sub-warp of kLanes lanes, kPerLane columns each. The matrix exp(scores + potential) is kept in registers (kRows
// rows per sub-warp), and an iteration only multiplies: row sums, then an all-reduce of the column sums, from which every
// block computes the same factors of the columns. Factors that leave the range where fp32 is safe are absorbed into the
// potentials, in the log domain, and the matrix is recomputed (Schmitzer, "Stabilized sparse scaling algorithms for
// entropy regularized transport problems", 2019). With kRows = 0 the matrix is too large to keep and is recomputed in
// every iteration.
//
// All sums have a fixed order: the same bits on every run, in every block.
#pragma once

#include "sinkhorn/all_reduce.cuh"

namespace moe::cuda::sinkhorn_detail {

constexpr float kSafe = 1e15f;  // factors stay in [1 / kSafe, kSafe]

template <class Format_, int kLanes_, int kPerLane_, int kRows_, bool kAligned_>
struct KernelTraits {
  using Format = Format_;
  static constexpr bool kAligned = kAligned_;  // logits and scores may be moved kChunk at once
  static constexpr int kLanes = kLanes_, kPerLane = kPerLane_, kRows = kRows_, kWidth = kLanes * kPerLane;
  static constexpr int kSubwarps = kThreads / kLanes;  // per block
  static constexpr bool kKept = kRows > 0;
  static constexpr bool kFull = kRows * kPerLane > 64;                             // few registers are left
  static constexpr int kTogether = kPerLane > 16 ? 1 : kFull || !kKept ? 2 : 4;    // rows computed side by side
  static constexpr int kLoaded = kFull ? kRows / 2 : kKept ? kRows : kTogether;    // rows in flight
  static constexpr bool kHeld = kKept && !kFull && sizeof(typename Format::Bits) == 2;  // logits stay in registers too
};

// What a sub-warp keeps of its rows in registers. Apart from SubwarpRows, or more of it spills.
template <class Traits>
struct KeptRows {
  using Raw = RawLogits<typename Traits::Format, Traits::kLanes, Traits::kPerLane>;
  using Offsets = RowOffsets<Traits::kLanes, Traits::kPerLane, Traits::kTogether>;
  Raw logits[Traits::kHeld ? Traits::kRows : 1];
  Offsets offsets[Traits::kKept ? Traits::kRows / Traits::kTogether : 1];
  float values[Traits::kKept ? Traits::kRows : 1][Traits::kPerLane] = {};  // exp2(z + kLift); 0 in rows that take no part
};

// A sub-warp's rows, one per round: their logits and, where they are kept, their part of the matrix.
template <class Traits>
class SubwarpRows {
 public:
  static constexpr int kLanes = Traits::kLanes, kPerLane = Traits::kPerLane, kRows = Traits::kRows;
  static constexpr int kTogether = Traits::kTogether, kLoaded = Traits::kLoaded;
  static constexpr bool kKept = Traits::kKept, kHeld = Traits::kHeld;
  using Raw = typename KeptRows<Traits>::Raw;
  using Offsets = typename KeptRows<Traits>::Offsets;

  __device__ __forceinline__ SubwarpRows(const SinkhornLaunch& p, KeptRows<Traits>& kept)
      : p_(p),
        kept_(kept),
        stride_(int64_t(gridDim.x) * Traits::kSubwarps),
        first_(int64_t(blockIdx.x) * Traits::kSubwarps + threadIdx.x / kLanes),
        rounds_(kKept ? p.rows : ceil_div(p.tokens, stride_)) {}

  // Potentials may be large from now on: rows need their `top`.
  __device__ __forceinline__ void set_shifted() { shifted_ = true; }

  __device__ __forceinline__ void hold_logits() {
    if constexpr (kHeld) load(kept_.logits, 0, kRows);
  }

  // Recomputes the kept matrix with the potentials as they are; returns the rows that take part.
  __device__ __forceinline__ int recompute(const float* potentials) {
    float potential[kPerLane];
    read_columns<kLanes>(potentials, potential);
    int live = 0;
    for_each([&](Offsets& offsets, const Raw* raw, int round) {
      live += exponentials(offsets, raw, round, potential, kept_.values + round);
    });
    return live;
  }

  // Adds every row, scaled to sum to 1 with these factors of the columns, to `sums`, but for the factors. Returns the
  // rows that take part, where they are not kept.
  __device__ __forceinline__ int add_scaled(const float* potentials, const float (&factors)[kPerLane],
                                            float (&sums)[kPerLane]) {
    int live = 0;
    if constexpr (kKept) {
      add(kept_.values, factors, sums);
    } else {
      float potential[kPerLane];
      read_columns<kLanes>(potentials, potential);
      for_each([&](Offsets& offsets, const Raw* raw, int64_t round) {
        float values[kTogether][kPerLane];
        live += exponentials(offsets, raw, round, potential, values);
        add(values, factors, sums);
      });
    }
    return live;
  }

  // Writes the scores, natural logarithms. `added`: what the columns add to a score.
  __device__ __forceinline__ void write_scores(const float* potentials, const float* factors_of, const float* added_of) {
    float potential[kPerLane], added[kPerLane], factors[kPerLane];
    read_columns<kLanes>(potentials, potential);
    read_columns<kLanes>(added_of, added);
    read_columns<kLanes>(factors_of, factors);
    const float sharpness = 1 / p_.temperature;
    float kept_scales[kKept ? kRows : 1];
    if constexpr (kKept) scales_of<kLanes>(kept_.values, factors, kept_scales);
    for_each([&](Offsets& offsets, const Raw* raw, auto round) {
      float scales[kTogether];
      if constexpr (kKept) {
#pragma unroll
        for (int a = 0; a < kTogether; ++a) scales[a] = kept_scales[round + a];
      } else {
        float values[kTogether][kPerLane];
        exponentials(offsets, raw, round, potential, values);
        scales_of<kLanes>(values, factors, scales);
      }
#pragma unroll
      for (int a = 0; a < kTogether; ++a) write_row_scores(offsets, raw[a], a, round + a, scales[a], sharpness, added);
    });
  }

 private:
  __device__ __forceinline__ int64_t row_of(int64_t round) const { return first_ + round * stride_; }
  __device__ __forceinline__ bool takes_part(int64_t round) const { return round < rounds_ && row_of(round) < p_.tokens; }

  __device__ __forceinline__ void load(Raw* raw, int64_t begin, int count) const {
#pragma unroll
    for (int a = 0; a < count; ++a) {
      if (begin + a < rounds_) raw[a].template load<Traits::kAligned>(p_, min(row_of(begin + a), p_.tokens - 1));
    }
  }

  // Calls use(offsets, logits, the first round) for kTogether rows at a time. Where rows are not kept the next ones are
  // loaded meanwhile, and the loop stays rolled.
  template <class Use>
  __device__ __forceinline__ void for_each(const Use& use) {
    if constexpr (kKept) {
#pragma unroll
      for (int begin = 0; begin < kRows; begin += kLoaded) {
        if (begin >= rounds_) break;
        Raw loaded[kHeld ? 1 : kLoaded];
        if constexpr (!kHeld) load(loaded, begin, kLoaded);
#pragma unroll
        for (int r = 0; r < kLoaded; r += kTogether) {
          const int round = begin + r;
          if (round < rounds_) use(kept_.offsets[round / kTogether], kHeld ? kept_.logits + round : loaded + r, round);
        }
      }
    } else {
      Raw next[kLoaded];
      load(next, 0, kLoaded);
#pragma unroll 1
      for (int64_t round = 0; round < rounds_; round += kTogether) {
        Raw raw[kTogether];
#pragma unroll
        for (int a = 0; a < kTogether; ++a) raw[a] = next[a];
        load(next, round + kTogether, kLoaded);
        use(kept_.offsets[0], raw, round);
      }
    }
  }

  // exp2(z + kLift) of kTogether rows, 0 in rows that take no part; returns how many do.
  __device__ __forceinline__ int exponentials(Offsets& offsets, const Raw* raw, int64_t round,
                                              const float (&potential)[kPerLane], float (*values)[kPerLane]) const {
    offsets.find(p_, raw, [&](int a) { return takes_part(round + a); }, potential, shifted_);
    return offsets.exponentials(p_, raw, potential, shifted_, values);
  }

  template <int kCount>
  static __device__ __forceinline__ void add(const float (&rows)[kCount][kPerLane], const float (&factors)[kPerLane],
                                             float (&sums)[kPerLane]) {
    float scales[kCount];
    scales_of<kLanes>(rows, factors, scales);
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) sums[v] += rows[r][v] * scales[r];
    }
  }

  __device__ __forceinline__ void write_row_scores(const Offsets& offsets, const Raw& raw, int a, int64_t round,
                                                   float scale, float sharpness, const float (&added)[kPerLane]) const {
    const float of_row = (log2f(scale) + kLift - offsets.top[a]) * kLn2;
    float scores[kPerLane], lowest = INFINITY;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      scores[v] = offsets.z(p_, raw, a, v, sharpness, added) + of_row;
      lowest = fminf(lowest, scores[v]);
    }
    if (lowest == -INFINITY) {  // a mask stays one, a huge difference does not become one
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        if (scores[v] == -INFINITY && raw.at(p_, v) != -INFINITY) scores[v] = -FLT_MAX;
      }
    }
    if (takes_part(round)) write_row<kLanes, Traits::kAligned>(p_, row_of(round), scores);
  }

  const SinkhornLaunch& p_;
  KeptRows<Traits>& kept_;
  const int64_t stride_, first_, rounds_;
  bool shifted_ = !kKept;
};

// The step of one iteration: a thread's columns, each factor times target / sum.
template <int kWidth>
struct FactorStep {
  using Lanes = ColumnLanes<kWidth>;
  static constexpr int kColumns = Lanes::kColumns;

  float before[kColumns], sums[kColumns];  // factors before the step, and column sums
  bool unconverged = false, needs_rescale = false;

  template <class AllReduce>
  __device__ __forceinline__ void apply(const SinkhornLaunch& p, const Columns<kWidth>& columns, const AllReduce& all_reduce,
                                        const Lanes& lanes, int iteration, float target) {
    const float safe_target = fmaxf(target, FLT_MIN);
    float after[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int e = lanes.column(c);
      const float sum = all_reduce.column(e, iteration, lanes);
      const bool inside = e < p.experts;
      unconverged |= inside && sum > 0 && p.tolerance > 0 && fabsf(sum - target) > p.tolerance * target;
      before[c] = columns.factor[e];
      sums[c] = fmaxf(sum, FLT_MIN);
      after[c] = before[c] * __fdividef(safe_target, sums[c]);
      needs_rescale |= inside && !(after[c] < kSafe && after[c] > 1 / kSafe);
    }
    __syncwarp();  // all lanes of a column have read the factors before
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (lanes.column(c) < p.experts) columns.factor[lanes.column(c)] = after[c];
    }
  }

  // Moves the factors, with this step, into the potentials.
  __device__ __forceinline__ void absorb(const SinkhornLaunch& p, const Columns<kWidth>& columns, const Lanes& lanes,
                                         float target) const {
    const float safe_target = fmaxf(target, FLT_MIN);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int e = lanes.column(c);
      if (e >= p.experts || lanes.mine != 0) continue;
      columns.potential[e] += log2f(before[c]) + (log2f(safe_target) - log2f(sums[c]));
      columns.factor[e] = 1;
    }
    __syncthreads();
  }
};

template <int kWidth>
__device__ __forceinline__ void init_columns(const Columns<kWidth>& columns, int experts) {
  for (int e = threadIdx.x; e < kWidth; e += kThreads) {
    columns.potential[e] = 0;
    columns.factor[e] = e < experts ? 1.0f : 0.0f;
  }
}

// Each warp's sums of the columns, to shared memory.
template <class Traits>
__device__ __forceinline__ void store_warp_sums(const Columns<Traits::kWidth>& columns, float (&sums)[Traits::kPerLane]) {
  int held;
  const int offset = sum_over_subwarps<Traits::kLanes>(sums, held);
  float* const parts = columns.parts + threadIdx.x / kWarp * Columns<Traits::kWidth>::kPart;
#pragma unroll
  for (int v = 0; v < Traits::kPerLane; ++v) {
    if (v < held) parts[column_of<Traits::kLanes>(offset + v)] = sums[v];
  }
}

template <class Traits>
__device__ __forceinline__ void add_block_rows(int& block_rows, int live) {
  const int warp_rows = __reduce_add_sync(kFullMask, threadIdx.x % Traits::kLanes == 0 ? live : 0);
  if (threadIdx.x % kWarp == 0) atomicAdd(&block_rows, warp_rows);
}

// What the columns add to a score, a natural logarithm, to where the warps' sums were.
template <int kWidth>
__device__ __forceinline__ void store_added(const Columns<kWidth>& columns) {
  for (int e = threadIdx.x; e < kWidth; e += kThreads) {
    columns.parts[e] = (columns.potential[e] + log2f(columns.factor[e])) * kLn2;
  }
  __syncthreads();
}

template <class Traits, template <int> class AllReduce>
__global__ void __launch_bounds__(kThreads) sinkhorn_kernel(const SinkhornLaunch p) {
  constexpr int kWidth = Traits::kWidth, kPerLane = Traits::kPerLane;
  extern __shared__ __align__(16) float shared[];
  __shared__ DsmemMailbox::Barriers barriers;
  __shared__ int block_rows;  // that take part
  // One plus the last iteration that needed a rescale, and that had not converged.
  struct alignas(8) StatusFlags {
    int needs_rescale, unconverged;
  };
  __shared__ StatusFlags status;

  const Columns<kWidth> columns(shared);
  const AllReduce<kWidth> all_reduce(p, columns, barriers);
  KeptRows<Traits> kept;
  SubwarpRows<Traits> rows(p, kept);
  const ColumnLanes<kWidth> lanes;
  init_columns(columns, p.experts);
  if (threadIdx.x == 0) block_rows = status.needs_rescale = status.unconverged = 0;
  __syncthreads();
  launch_dependent_grids();
  wait_on_dependent_grids();
  all_reduce.begin();
  rows.hold_logits();
  int live = 0;  // rows of this sub-warp that take part
  if constexpr (Traits::kKept) live = rows.recompute(columns.potential);

  float target = 0;  // of a column's sum
  for (int i = 0; i < p.iterations; ++i) {
    float factors[kPerLane], sums[kPerLane] = {};
    read_columns<Traits::kLanes>(columns.factor, factors);
    const int seen = rows.add_scaled(columns.potential, factors, sums);
    if (!Traits::kKept && i == 0) live = seen;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) sums[v] *= factors[v];
    store_warp_sums<Traits>(columns, sums);
    if (i == 0) add_block_rows<Traits>(block_rows, live);
    __syncthreads();
    all_reduce.contribute(block_rows, i, lanes);

    if (i == 0) target = all_reduce.rows(lanes) / float(p.experts);
    FactorStep<kWidth> step;
    step.apply(p, columns, all_reduce, lanes, i, target);
    if (!Traits::kKept || step.needs_rescale) status.needs_rescale = i + 1;
    if (step.unconverged) status.unconverged = i + 1;
    __syncthreads();
    const StatusFlags seen_status = status;
    if (__builtin_expect(seen_status.needs_rescale == i + 1, false)) {
      step.absorb(p, columns, lanes, target);
      rows.set_shifted();
      if constexpr (Traits::kKept) rows.recompute(columns.potential);
    }
    if (p.tolerance > 0 && seen_status.unconverged != i + 1) break;
  }
  store_added(columns);
  rows.write_scores(columns.potential, columns.factor, columns.parts);
}

}  // namespace moe::cuda::sinkhorn_detail
