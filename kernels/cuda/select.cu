// Select on the GPU, one launch. kLanes lanes of a warp share a row, hold its logits in registers and rank them
// there (ranks.cuh); lane j then makes the weight of the j-th winner. Only winners are exponentiated: where weights
// are normalised over them, the denominator of the softmax over all experts cancels.
#include "select.h"

#include <algorithm>

#include "ranks.cuh"
#include "tally.cuh"

namespace moe::cuda {
namespace {

constexpr int kMaxWarps = 16;          // of a block
constexpr int kMinWarps = 4;
constexpr int kBlocksPerSm = 2;        // then rows are strided over: every block adds to every count

__device__ Tally<kMaxExperts + 1> tally;
constexpr int kInvalid = kMaxExperts;  // its cell
TallyRows tally_rows;

struct SelectLaunch : SelectParams {
  int tally_row;
  bool aligned;  // chunks of logits may be loaded at once
};

template <class Real>
__device__ Real sigmoid(Real x) {
  return Real(1) / (Real(1) + exp(-x));
}

// kIndirect: experts rank by something else than their logits.
template <class Format, int kLanes, int kPerLane, bool kIndirect>
struct Row {
  using Bits = typename Format::Bits;
  using Real = typename Format::Real;
  using RankFormat = std::conditional_t<!kIndirect, Format, std::conditional_t<sizeof(Real) == 8, Fp64, Fp32>>;
  using Layout = RowLayout<RankFormat, kLanes, kPerLane>;
  using Ranked = Ranks<RankFormat, kLanes, kPerLane>;

  const SelectLaunch& p;
  int64_t t;
  const Bits* logits;
  Layout layout;

  __device__ Real at(int id) const { return Format::to_real(logits[id]); }

  // Calls use(first slot, the bits of a chunk, how many of them are in the row), for every chunk of this lane.
  template <class Use>
  __device__ void each_chunk(const Use& use) const {
    struct alignas(sizeof(Bits) * Layout::kChunk) Chunk {
      Bits bits[Layout::kChunk];
    };
#pragma unroll
    for (int c = 0; c < Layout::kChunks; ++c) {
      const int id = layout.first_id(c), inside = min(p.experts - id, Layout::kChunk);
      Chunk chunk;
      if (p.aligned) {
        if (inside > 0) chunk = *reinterpret_cast<const Chunk*>(logits + id);
      } else {
#pragma unroll
        for (int i = 0; i < Layout::kChunk; ++i) chunk.bits[i] = i < inside ? logits[id + i] : Bits(0);
      }
      use(c * Layout::kChunk, chunk.bits, inside);
    }
  }

  __device__ void rank(Ranked& ranks, bool careful) const {
    each_chunk([&](int v, const Bits* bits, int inside) {
#pragma unroll
      for (int i = 0; i < Layout::kChunk; i += Ranked::kPerWord) {
        if constexpr (kIndirect) {
          if (i >= inside) continue;
          const Real rank = rank_of(p, t, layout.id_at(v + i), Format::to_real(bits[i]));
          ranks.set(v + i, RankFormat::from_real(rank), careful);
        } else {
          typename Ranked::Word word;
          memcpy(&word, bits + i, sizeof(word));
          ranks.set(v + i, word, careful);
        }
      }
#pragma unroll
      for (int i = 0; i < Layout::kChunk; ++i) {
        if (i >= inside) ranks.clear(v + i);
      }
    });
  }

  // The softmax over all experts of a logit is exp(logit - this).
  __device__ Real log_sum_exp() const {
    Real largest = -INFINITY, sum = 0;
    each_chunk([&](int, const Bits* bits, int inside) {
#pragma unroll
      for (int i = 0; i < Layout::kChunk; ++i) {
        if (i < inside) largest = max(largest, Format::to_real(bits[i]));
      }
    });
    largest = group_max<kLanes>(largest);
    each_chunk([&](int, const Bits* bits, int inside) {
#pragma unroll
      for (int i = 0; i < Layout::kChunk; ++i) {
        if (i < inside) sum += exp(Format::to_real(bits[i]) - largest);
      }
    });
    return largest + log(group_sum<kLanes>(sum));
  }
};

template <class Format, int kLanes, int kPerLane, bool kIndirect>
__global__ void __launch_bounds__(kMaxWarps* kWarp) select_kernel(const SelectLaunch p) {
  using RowOf = Row<Format, kLanes, kPerLane, kIndirect>;
  using Ranked = typename RowOf::Ranked;
  using Place = typename Ranked::Place;
  using Real = typename Format::Real;
  constexpr int kKept = (kLanes * kPerLane < kMaxTopK ? kLanes * kPerLane : kMaxTopK) / kLanes;

  __shared__ int32_t counts[kLanes * kPerLane];
  __shared__ int32_t invalid;
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) counts[e] = 0;
  if (threadIdx.x == 0) invalid = 0;
  __syncthreads();
  let_next_start();
  wait_for_previous();

  // All lanes of a warp stay in the loop together: the shuffles name all of them.
  const int lane = threadIdx.x % kLanes;
  const int rows = blockDim.x / kLanes;
  const int64_t stride = int64_t(gridDim.x) * rows;
  const int64_t first = int64_t(blockIdx.x) * rows + threadIdx.x / kLanes;
  const int64_t warp_first = first - threadIdx.x % kWarp / kLanes;
  for (int64_t ahead = 0; warp_first + ahead < p.tokens; ahead += stride) {
    const int64_t t = first + ahead;
    const bool active = t < p.tokens;
    const int64_t read = active ? t : 0;
    const RowOf row{p, read, static_cast<const typename Format::Bits*>(p.logits) + read * p.row_stride, {lane}};

    Ranked ranks(row.layout);
    row.rank(ranks, false);
    Place best = ranks.next();
    const bool nan = Ranked::key_of(best) > Ranked::kPlusInf;
    if (__any_sync(kAllLanes, nan)) {
      ranks = Ranked(row.layout);
      row.rank(ranks, true);
      best = ranks.next();
    }

    bool bad = nan || Ranked::key_of(best) == Ranked::kPlusInf;
    const Real top = Real(Ranked::value_of(best));
    Place kept[kKept];
    for (int j = 0;;) {
#pragma unroll
      for (int s = 0; s < kKept; ++s) {
        if (s * kLanes + lane == j) kept[s] = best;
      }
      if (++j == p.top_k) break;
      best = ranks.next();
    }
    bad |= Ranked::key_of(best) == Ranked::kMinusInf;  // the last is the least

    Real weights[kKept], sum = 0;
    const Real log_all = p.score == Score::kSoftmax && !p.renormalize ? row.log_sum_exp() : top;
#pragma unroll
    for (int s = 0; s < kKept; ++s) {
      weights[s] = 0;
      if (s * kLanes + lane < p.top_k) {
        const Real logit = kIndirect ? row.at(Ranked::id_of(kept[s])) : Real(Ranked::value_of(kept[s]));
        weights[s] = p.score == Score::kSigmoid ? sigmoid(logit) : exp(logit - log_all);
        sum += weights[s];
      }
    }
    if (p.renormalize) sum = max(group_sum<kLanes>(sum), std::numeric_limits<Real>::min());

    if (!active) continue;
    if (bad && lane == 0) atomicAdd(&invalid, 1);
#pragma unroll
    for (int s = 0; s < kKept; ++s) {
      const int j = s * kLanes + lane;
      if (j < p.top_k) {
        const Real weight = p.renormalize ? weights[s] / sum : weights[s];
        const int id = Ranked::id_of(kept[s]);
        p.expert_ids[t * p.top_k + j] = id;
        static_cast<Real*>(p.weights)[t * p.top_k + j] = bad ? Real(NAN) : weight;
        atomicAdd(&counts[id], 1);
      }
    }
  }

  __syncthreads();
  for (int e = threadIdx.x; e <= p.experts; e += blockDim.x) {
    const bool is_count = e < p.experts;
    const int32_t number = is_count ? counts[e] : invalid;
    int32_t* const out = is_count ? &p.tokens_per_expert[e] : p.invalid_rows;
    if (p.tally_row < 0) {
      if (number != 0) atomicAdd(out, number);
    } else {
      tally.add(p.tally_row, is_count ? e : kInvalid, uint32_t(number), gridDim.x, out);
    }
  }
}

__global__ void clear_counts(int32_t* tokens_per_expert, int32_t* invalid_rows, int experts) {
  for (int e = threadIdx.x; e < experts; e += blockDim.x) tokens_per_expert[e] = 0;
  if (threadIdx.x == 0) *invalid_rows = 0;
}

template <class Format, int kLanes, int kPerLane, bool kIndirect>
void launch(SelectLaunch p, Stream stream) {
  using Layout = typename Row<Format, kLanes, kPerLane, kIndirect>::Layout;
  constexpr int64_t kChunkBytes = Layout::kChunk * sizeof(typename Format::Bits);
  p.aligned = reinterpret_cast<uintptr_t>(p.logits) % kChunkBytes == 0 && p.experts % Layout::kChunk == 0 &&
              p.row_stride % Layout::kChunk == 0;
  // First a block on every multiprocessor, then more warps in each, then more blocks.
  const int64_t warps = ceil_div<int64_t>(p.tokens, kWarp / kLanes), sms = multiprocessors();
  const int64_t per_block = std::clamp<int64_t>(ceil_div(warps, sms), kMinWarps, kMaxWarps);
  const int64_t blocks = std::clamp<int64_t>(ceil_div(warps, per_block), 1, kBlocksPerSm * sms);
  launch_early(select_kernel<Format, kLanes, kPerLane, kIndirect>, unsigned(blocks), unsigned(per_block) * kWarp, 0,
               stream, p);
}

template <class Format, bool kIndirect>
void launch_for(const SelectLaunch& p, Stream stream) {
  const int e = p.experts;
  if (e <= 8) launch<Format, 1, 8, kIndirect>(p, stream);
  else if (e <= 16) launch<Format, 2, 8, kIndirect>(p, stream);
  else if (e <= 32) launch<Format, 4, 8, kIndirect>(p, stream);
  else if (e <= 64) launch<Format, 8, 8, kIndirect>(p, stream);
  else if (e <= 128) launch<Format, 16, 8, kIndirect>(p, stream);
  else if (e <= 256) launch<Format, 32, 8, kIndirect>(p, stream);
  else if (e <= 512) launch<Format, 32, 16, kIndirect>(p, stream);
  else launch<Format, 32, 32, kIndirect>(p, stream);  // check_sizes: at most 1024
}

}  // namespace

Status select_forward(const SelectParams& params, Stream stream) {
  if (const Status status = check_sizes(params); !status.ok()) return status;
  return dispatch(params.dtype, [&](auto format) -> Status {
    SelectLaunch p{params, tally_rows.row_of(native(stream)), false};
    if (p.tally_row < 0) {
      clear_counts<<<1, 256, 0, native(stream)>>>(p.tokens_per_expert, p.invalid_rows, p.experts);
    }
    if (p.bias == nullptr && p.ranks == nullptr) launch_for<decltype(format), false>(p, stream);
    else launch_for<decltype(format), true>(p, stream);
    return launched();
  });
}

}  // namespace moe::cuda
