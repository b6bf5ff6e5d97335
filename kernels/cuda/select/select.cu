// Select on the GPU, one launch: the plain kernel in the shape that fits E and K, or one that supports everything.
#include "select.h"

#include <algorithm>

#include "select/select_subwarp.cuh"

namespace moe::cuda {
namespace {

CounterSlotAllocator counter_slots;

__global__ void clear_counts(int32_t* tokens_per_expert, int32_t* invalid_rows, int experts) {
  for (int e = threadIdx.x; e < experts; e += blockDim.x) tokens_per_expert[e] = 0;
  if (threadIdx.x == 0) *invalid_rows = 0;
}

template <class Format, int kLanes, int kPerLane>
void launch_for_k(const SelectLaunch& p, Stream stream) {
  const bool exact = p.mask == nullptr && p.scaling_factor == 1;
  switch (exact ? p.top_k : 0) {  // the common ones are unrolled
    case 1: return launch_select<Format, kLanes, kPerLane, 1, true, false>(p, stream);
    case 2: return launch_select<Format, kLanes, kPerLane, 2, true, false>(p, stream);
    case 4: return launch_select<Format, kLanes, kPerLane, 4, true, false>(p, stream);
    case 8: return launch_select<Format, kLanes, kPerLane, 8, true, false>(p, stream);
  }
  if (p.top_k < 8) launch_select<Format, kLanes, kPerLane, 8, false, false>(p, stream);
  else launch_select<Format, kLanes, kPerLane, kMaxTopK, false, false>(p, stream);  // check_sizes: at most 32
}

// Latency counts: more lanes a row.
bool few_rows(const SelectLaunch& p) { return p.tokens <= 64 * num_sms(); }

template <class Format>
void launch_plain(const SelectLaunch& p, Stream stream) {
  const int e = p.experts;
  const bool few = few_rows(p);
  if (e <= 8) return launch_for_k<Format, 1, 8>(p, stream);
  if (e <= 32) return launch_for_k<Format, 4, 8>(p, stream);
  if (e <= 64) return few ? launch_for_k<Format, 8, 8>(p, stream) : launch_for_k<Format, 4, 16>(p, stream);
  if (e <= 128) return few ? launch_for_k<Format, 16, 8>(p, stream) : launch_for_k<Format, 8, 16>(p, stream);
  if constexpr (sizeof(typename Format::Bits) == 2) {  // others: a warp per row
    if (e <= 256) launch_for_k<Format, 32, 8>(p, stream);
    else if (e <= 512) launch_for_k<Format, 32, 16>(p, stream);
    else launch_for_k<Format, 32, 32>(p, stream);  // check_sizes: at most 1024
  }
}

// Any score and selection by any scores, in the type of the arithmetic.
Status launch_few_experts(const SelectLaunch& p, Stream stream) {
  return dispatch_dtype(p.dtype, [&](auto format) -> Status {
    using Format = decltype(format);
    if (p.experts <= 32) launch_select<Format, 4, 8, kMaxTopK, false, true>(p, stream);
    else launch_select<Format, 8, 8, kMaxTopK, false, true>(p, stream);
    return last_error();
  });
}

}  // namespace

Status select_forward(const SelectParams& params, Stream stream) {
  if (const Status status = check_sizes(params); !status.ok()) return status;
  if (const Status status = check_groups(params); !status.ok()) return status;
  if (params.tokens < 0 || params.tokens > INT32_MAX) return {Code::kTokens};
  const bool countable = params.tokens <= kMaxCount;
  const int slot = countable ? counter_slots.slot_for(native(stream)) : -1;
  const SelectLaunch p{params, slot, false, float(params.scaling_factor)};
  if (p.counter_slot < 0) {
    clear_counts<<<1, 256, 0, native(stream)>>>(p.tokens_per_expert, p.invalid_rows, p.experts);
  }
  const bool grouped = p.topk_group < p.n_group, by_logits = p.selection_scores == nullptr && !ranks_by_score(p);
  const bool plain = p.score == Score::kSoftmax && p.renormalize && by_logits && !grouped;
  const int most = p.dtype == DType::kFp32 ? 128 : kMaxExperts;  // of the plain kernel
  const bool few_experts =
      p.experts <= 64 && !grouped && p.gap_counts == nullptr && (p.top_k < 4 || !few_rows(p));
  if (plain && p.experts <= most && p.dtype == DType::kFp16) launch_plain<Fp16>(p, stream);
  else if (plain && p.experts <= most && p.dtype == DType::kBf16) launch_plain<Bf16>(p, stream);
  else if (plain && p.experts <= most && p.dtype == DType::kFp32) launch_plain<Fp32>(p, stream);
  else if (few_experts) return launch_few_experts(p, stream);
  else return launch_warp_per_row(p, stream);
  return last_error();
}

}  // namespace moe::cuda
