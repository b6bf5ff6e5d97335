// Select with a warp per row: any weighting, ranking and dtype, groups, and the gaps that quantile balancing reads.
#include <algorithm>

#include "select/warp_row.cuh"

namespace moe::cuda {
namespace {

// Of a block, by registers.
template <class Real, int kPerLane>
constexpr int kMostWarps = (kPerLane > 8 ? 16 : 32) / (sizeof(Real) == 8 ? 2 : 1);

// Gaps of a block: 16 bit counts of tokens, those below 0 and those above it in halves of a word, [distance][place], where
// lanes of a warp have neighbouring places, so that their atomics meet in no bank of shared memory.
constexpr int64_t kMaxBlockRows = (1 << 16) - 1;

template <class Real, int kPerLane>
struct GapCounts {
  static constexpr int kPlaces = kPerLane * kWarp;
  static constexpr int kWords = kGapBins / 2 * kPlaces;
  static constexpr int kChunk = RowLayout<std::conditional_t<sizeof(Real) == 8, Fp64, Fp32>, kWarp, kPerLane>::kChunk;
  uint32_t* words;

  __device__ void clear() const {
    for (int i = threadIdx.x; i < kWords; i += blockDim.x) words[i] = 0;
  }

  __device__ void add(int lane, Real cutoff, const Real (&scores)[kPerLane]) const {
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      const float gap = float(cutoff - scores[v]);
      atomicAdd(&words[gap_distance(gap) * kPlaces + v * kWarp + lane], gap < 0 ? 1u : 1u << 16);
    }
  }

  // Neighbouring threads add to neighbouring experts.
  __device__ void flush(float* counts, int experts) const {
    for (int i = threadIdx.x; i < kWords; i += blockDim.x) {
      const int id = i % kPlaces, distance = i / kPlaces, chunk = id / kChunk;
      if (id >= experts) continue;
      const uint32_t both = words[i - id + (chunk / kWarp * kChunk + id % kChunk) * kWarp + chunk % kWarp];
      const uint32_t below = both & 0xffff, above = both >> 16;
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

template <class Real, int kPerLane, Ranking kRanking>
__global__ void __launch_bounds__(kMostWarps<Real, kPerLane> * kWarp, 1)
    select_row_kernel(const SelectLaunch p, SharedBytes bytes) {
  __shared__ int32_t counts[kPerLane * kWarp];
  __shared__ int32_t invalid;
  extern __shared__ __align__(16) unsigned char dynamic[];
  const int warp = threadIdx.x / kWarp;
  auto& storage = reinterpret_cast<WarpStorage<Real>*>(dynamic)[warp];
  Real* const group_scores = reinterpret_cast<Real*>(dynamic + bytes.storage) + warp * p.experts;
  const GapCounts<Real, kPerLane> gaps{reinterpret_cast<uint32_t*>(dynamic + bytes.storage + bytes.group_scores)};
  const bool counts_gaps = kRanking != Ranking::kLogits && p.gap_counts != nullptr;
  clear_block_counts(p, counts, &invalid);
  if (counts_gaps) gaps.clear();
  __syncthreads();
  launch_dependent_grids();
  wait_on_dependent_grids();

  WarpRow<Real, kPerLane, kRanking> row(p, storage, group_scores);
  row.load_bias();
  const int lane = row.lane, tokens = int(p.tokens), warps = blockDim.x / kWarp, stride = gridDim.x * warps;
  const bool log_sum_needed = needs_log_sum(p);
  for (int t = blockIdx.x * warps + warp; t < tokens; t += stride) {
    Real logits[kPerLane], scores[kPerLane];
    row.load(t, logits);
    const Real log_sum = log_sum_needed ? row.log_sum_exp(logits) : Real(0);
    const bool valid = row.select(t, logits, log_sum, scores);
    const bool counted = p.mask == nullptr || p.mask[t];

    const bool has_winner = lane < p.top_k;
    const int id = storage.winners.ids[lane];
    const Real logit = has_winner ? storage.winners.logits[lane] : Real(-INFINITY);
    Real subtracted = log_sum;
    if (p.score == Score::kSoftmax && p.renormalize) {
      // The first winner has the highest logit, where these order the experts.
      subtracted = kRanking == Ranking::kLogits ? storage.winners.logits[0] : subwarp_max<kWarp>(logit);
    }
    const Real weight = has_winner ? score_of(p.score, logit, subtracted) : Real(0);
    Real scale = p.template scaling<Real>();
    if (p.renormalize) scale *= reciprocal(subwarp_sum<kWarp>(weight));
    if (has_winner) {
      const int64_t slot = int64_t(t) * p.top_k + lane;
      p.expert_ids[slot] = id;
      static_cast<Real*>(p.weights)[slot] = valid ? weight * scale : Real(NAN);
      if (counted) atomicAdd(&counts[id], 1);
    }
    if (!valid && counted && lane == 0) atomicAdd(&invalid, 1);
    if (counts_gaps && valid && counted) gaps.add(lane, storage.winners.scores[p.top_k], scores);
    __syncwarp();  // before the next row's winners
  }

  __syncthreads();
  add_block_counts(p, counts, invalid);
  if (counts_gaps) gaps.flush(p.gap_counts, p.experts);
}

template <class Real, int kPerLane, Ranking kRanking>
Status launch(SelectLaunch p, Stream stream) {
  using Row = WarpRow<Real, kPerLane, kRanking>;
  switch (p.dtype) {
    case DType::kFp64: p.aligned = Row::template Fragment<Fp64>::aligned(p); break;
    case DType::kFp32: p.aligned = Row::template Fragment<Fp32>::aligned(p); break;
    case DType::kFp16: p.aligned = Row::template Fragment<Fp16>::aligned(p); break;
    case DType::kBf16: p.aligned = Row::template Fragment<Bf16>::aligned(p); break;
  }
  const SelectGrid grid = select_grid(p, 1, kMostWarps<Real, kPerLane>);
  if (p.gap_counts != nullptr && ceil_div<int64_t>(p.tokens, grid.blocks) > kMaxBlockRows) return {Code::kTokens};
  const size_t warps = grid.threads / kWarp;
  SharedBytes bytes{warps * sizeof(WarpStorage<Real>), 0, 0};
  if (p.topk_group < p.n_group) bytes.group_scores = ceil_div<size_t>(warps * p.experts * sizeof(Real), 16) * 16;
  if (p.gap_counts != nullptr) bytes.gaps = GapCounts<Real, kPerLane>::kWords * sizeof(uint32_t);
  const auto kernel = select_row_kernel<Real, kPerLane, kRanking>;
  if (bytes.total() > 32 << 10) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes.total()));
  }
  launch_pdl(kernel, grid.blocks, grid.threads, bytes.total(), stream, p, bytes);
  return last_error();
}

template <class Real, Ranking kRanking>
Status launch_for_experts(const SelectLaunch& p, Stream stream) {
  if (p.experts <= 128) return launch<Real, 4, kRanking>(p, stream);
  if (p.experts <= 256) return launch<Real, 8, kRanking>(p, stream);
  if (p.experts <= 512) return launch<Real, 16, kRanking>(p, stream);
  return launch<Real, 32, kRanking>(p, stream);  // check_sizes: at most 1024
}

}  // namespace

Status launch_warp_per_row(const SelectLaunch& p, Stream stream) {
  if (p.dtype == DType::kFp64) return launch_for_experts<double, Ranking::kAny>(p, stream);
  if (p.selection_scores == nullptr && !ranks_by_score(p)) {
    return launch_for_experts<float, Ranking::kLogits>(p, stream);
  }
  const bool sigmoids = p.score == Score::kSigmoid && p.selection_scores == nullptr;
  if (sigmoids) return launch_for_experts<float, Ranking::kSigmoid>(p, stream);
  return launch_for_experts<float, Ranking::kAny>(p, stream);
}

}  // namespace moe::cuda
