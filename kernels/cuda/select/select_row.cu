// Select with a warp per row: any weighting, ranking and dtype, groups, and the gaps that quantile balancing reads.
#include <algorithm>

#include "select/warp_row.cuh"

namespace moe::cuda {
namespace {

// Gaps of a block: 16 bit counts of tokens, those below 0 and those above it in halves of a word, [distance][place], where
// lanes of a warp have neighbouring places, so that their atomics meet in no bank of shared memory.
constexpr int64_t kMaxBlockRows = (1 << 16) - 1;

template <class Row, int kPlaces>
struct GapCounts {
  static constexpr int kWords = kGapBins / 2 * kPlaces;
  uint32_t* words;

  __device__ void clear() const {
    for (int i = threadIdx.x; i < kWords; i += blockDim.x) words[i] = 0;
  }

  __device__ void add(int place, float gap) const {
    atomicAdd(&words[gap_distance(gap) * kPlaces + place], gap < 0 ? 1u : 1u << 16);
  }

  // Neighbouring threads add to neighbouring experts.
  __device__ void flush(float* counts, int experts) const {
    for (int i = threadIdx.x; i < kWords; i += blockDim.x) {
      const int id = i % kPlaces, distance = i / kPlaces;
      if (id >= experts) continue;
      const uint32_t both = words[i - id + Row::place(id)], below = both & 0xffff, above = both >> 16;
      if (below != 0) atomicAdd(&counts[int64_t(kGapBins / 2 - 1 - distance) * experts + id], float(below));
      if (above != 0) atomicAdd(&counts[int64_t(kGapBins / 2 + distance) * experts + id], float(above));
    }
  }
};

// In the order in which they lie in shared memory.
struct SharedBytes {
  size_t storage, group_scores, gaps;
  size_t total() const { return storage + group_scores + gaps; }
};

// Several rows, a lane for each of their winners: as many as a warp has room for, K to the next power of two.
template <class Real>
struct WinnerLanes {
  const SelectLaunch& p;
  WarpStorage<Real>& storage;
  int32_t* counts;  // (E) of the block, in shared memory
  int32_t* invalid;
  const bool first_is_largest;  // the first winner has the highest logit
  const int lane;
  int width = 1;                // lanes of a row
  int filled = 0;               // lanes in use
  int t = -1;                   // the row of this lane
  Real log_sum = 0;
  bool valid = false;

  __device__ WinnerLanes(const SelectLaunch& p, WarpStorage<Real>& storage, int32_t* counts, int32_t* invalid,
                         bool first_is_largest)
      : p(p),
        storage(storage),
        counts(counts),
        invalid(invalid),
        first_is_largest(first_is_largest),
        lane(threadIdx.x % kWarp) {
    while (width < p.top_k) width *= 2;
  }

  // The row whose winners were put from `filled` on.
  __device__ void add(int row, bool row_valid, Real row_log_sum) {
    if (lane >= filled) t = row, valid = row_valid, log_sum = row_log_sum;
    filled += width;
    if (filled == kWarp) write();
  }

  // Weights, ids and counts.
  __device__ void write() {
    const int j = lane & (width - 1);
    const bool active = lane < filled && j < p.top_k;
    const bool counted = active && (p.mask == nullptr || p.mask[t]);
    const int id = storage.winners.ids[lane];
    const Real logit = active ? storage.winners.logits[lane] : Real(-INFINITY);
    Real subtracted = log_sum;
    if (p.score == Score::kSoftmax && p.renormalize) {
      if (first_is_largest) subtracted = storage.winners.logits[lane - j];
      else subtracted = reduce(logit, [](Real a, Real b) { return max(a, b); });
    }
    const Real weight = active ? score_of(p.score, logit, subtracted) : Real(0);
    Real scale = p.template scaling<Real>();
    if (p.renormalize) scale *= reciprocal(reduce(weight, [](Real a, Real b) { return a + b; }));
    if (active) {
      const int64_t slot = int64_t(t) * p.top_k + j;
      p.expert_ids[slot] = id;
      static_cast<Real*>(p.weights)[slot] = valid ? weight * scale : Real(NAN);
    }
    if (counted) atomicAdd(&counts[id], 1);
    if (counted && !valid && j == 0) atomicAdd(invalid, 1);
    filled = 0;
    __syncwarp();  // before the next winners
  }

 private:
  template <class Combine>
  __device__ Real reduce(Real x, const Combine& combine) const {
    for (int apart = width / 2; apart > 0; apart /= 2) x = combine(x, __shfl_xor_sync(kFullMask, x, apart));
    return x;
  }
};

template <class Real, int kPerLane, Ranking kRanking>
using Row = std::conditional_t<sizeof(Real) == 8, ScannedRow<Real>, WarpRow<kPerLane, kRanking>>;
template <class Real, int kPerLane, Ranking kRanking>
using Gaps = GapCounts<Row<Real, kPerLane, kRanking>, kPerLane * kWarp>;

template <class Real, int kPerLane, Ranking kRanking>
__global__ void __launch_bounds__((kPerLane > 8 ? 16 : 32) * kWarp, 1)
    select_row_kernel(const SelectLaunch p, SharedBytes bytes) {
  __shared__ int32_t counts[kPerLane * kWarp];
  __shared__ int32_t invalid;
  extern __shared__ __align__(16) unsigned char dynamic[];
  const int warp = threadIdx.x / kWarp;
  auto& storage = reinterpret_cast<WarpStorage<Real>*>(dynamic)[warp];
  Real* const group_scores = reinterpret_cast<Real*>(dynamic + bytes.storage) + warp * p.experts;
  const Gaps<Real, kPerLane, kRanking> gaps{reinterpret_cast<uint32_t*>(dynamic + bytes.storage + bytes.group_scores)};
  const bool counts_gaps = kRanking != Ranking::kLogits && p.gap_counts != nullptr;
  clear_block_counts(p, counts, &invalid);
  if (counts_gaps) gaps.clear();
  __syncthreads();
  launch_dependent_grids();
  wait_on_dependent_grids();

  Row<Real, kPerLane, kRanking> row(p, storage, group_scores);
  WinnerLanes<Real> winners(p, storage, counts, &invalid, kRanking == Ranking::kLogits);
  const int tokens = int(p.tokens), warps = blockDim.x / kWarp, stride = gridDim.x * warps;
  for (int t = blockIdx.x * warps + warp; t < tokens; t += stride) {
    row.load(t);
    const bool valid = row.select(winners.filled);
    if (counts_gaps && valid && (p.mask == nullptr || p.mask[t])) {
      const Real cutoff = storage.winners.scores[kWarp];
      row.each_score([&](int place, Real score) { gaps.add(place, float(cutoff - score)); });
      __syncwarp();  // before the next cutoff
    }
    winners.add(t, valid, row.log_sum());
  }
  if (winners.filled > 0) winners.write();

  __syncthreads();
  add_block_counts(p, counts, invalid);
  if (counts_gaps) gaps.flush(p.gap_counts, p.experts);
}

template <class Real, int kPerLane, Ranking kRanking>
Status launch(SelectLaunch p, Stream stream) {
  p.aligned = Row<Real, kPerLane, kRanking>::aligned(p);
  const SelectGrid grid = select_grid(p, 1, kPerLane > 8 ? 16 : 32);
  if (p.gap_counts != nullptr && ceil_div<int64_t>(p.tokens, grid.blocks) > kMaxBlockRows) return {Code::kTokens};
  const size_t warps = grid.threads / kWarp;
  SharedBytes bytes{warps * sizeof(WarpStorage<Real>), 0, 0};
  if (p.topk_group < p.n_group) bytes.group_scores = ceil_div<size_t>(warps * p.experts * sizeof(Real), 16) * 16;
  if (p.gap_counts != nullptr) bytes.gaps = Gaps<Real, kPerLane, kRanking>::kWords * sizeof(uint32_t);
  const auto kernel = select_row_kernel<Real, kPerLane, kRanking>;
  if (bytes.total() > 32 << 10) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes.total()));
  }
  launch_pdl(kernel, grid.blocks, grid.threads, bytes.total(), stream, p, bytes);
  return last_error();
}

template <Ranking kRanking>
Status launch_for_experts(const SelectLaunch& p, Stream stream) {
  if (p.experts <= 128) return launch<float, 4, kRanking>(p, stream);
  if (p.experts <= 256) return launch<float, 8, kRanking>(p, stream);
  if (p.experts <= 512) return launch<float, 16, kRanking>(p, stream);
  return launch<float, 32, kRanking>(p, stream);  // check_sizes: at most 1024
}

}  // namespace

Status launch_warp_per_row(const SelectLaunch& p, Stream stream) {
  if (p.dtype == DType::kFp64) return launch<double, 32, Ranking::kAny>(p, stream);
  if (p.selection_scores == nullptr && !ranks_by_score(p)) return launch_for_experts<Ranking::kLogits>(p, stream);
  const bool sigmoids = p.score == Score::kSigmoid && p.selection_scores == nullptr;
  if (sigmoids) return launch_for_experts<Ranking::kSigmoid>(p, stream);
  return launch_for_experts<Ranking::kAny>(p, stream);
}

}  // namespace moe::cuda
