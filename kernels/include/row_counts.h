// How many rows leave a rank and come to it, for exchanges between ranks.
// Shapes: W ranks, E experts, L = E / W of a rank, C chunks of tokens, N slots. Slots are sorted into bins: those of
// other ranks' experts by chunk, rank and expert, C (E - L) in all, then those of this rank's, L; dropped slots have -1.
#pragma once

#include "select.h"
#include "status.h"

namespace moe {

struct Share {  // of the experts
  int rank;
  int ranks;          // W
  int chunks;         // C
  int local_experts;  // L
};

struct BinParams {
  const int32_t* expert_ids;  // (N)
  int32_t* bins;              // (N)
  int64_t slots;
  int64_t chunk_slots;  // of a chunk but the last ones, which may have fewer
  Share share;
};

struct LeavingParams {
  const int32_t* bin_offsets;  // (C (E - L) + L + 1), as build_index gives them
  int32_t* leaving;            // (W, C, L) rows for each expert; 0 for this rank's own, which stay
  int32_t* own_offsets;        // (L + 1) of the rows that stay, starts at 0
  Share share;
};

struct ArrivingParams {
  const int32_t* leaving;   // (W, C, L)
  const int32_t* arriving;  // (W, C, L) from each rank
  int32_t* totals;          // (2, C, W) rows that leave, rows that come; may be the host's
  int32_t* offsets;         // (C, L + 1) of the rows that come, by expert
  Share share;
};

inline Status check_sizes(const Share& s) {
  const bool fits = s.chunks >= 1 && s.local_experts >= 1 && s.ranks >= 1 && s.rank >= 0 && s.rank < s.ranks &&
                    int64_t(s.ranks) * s.local_experts <= kMaxExperts && s.chunks <= INT32_MAX / kMaxExperts;
  return {fits ? Code::kOk : Code::kShare};
}

namespace cuda {
Status bin_slots(const BinParams& params, Stream stream);
Status count_leaving(const LeavingParams& params, Stream stream);
Status count_arriving(const ArrivingParams& params, Stream stream);
}  // namespace cuda

}  // namespace moe
