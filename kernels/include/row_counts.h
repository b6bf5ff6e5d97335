// How many rows leave a rank and come to it, and where they stand, for exchanges between ranks.
// Shapes: W ranks, E experts, L = E / W of a rank, C chunks, G groups of l = L / G experts, N slots.
// A chunk is one of C / G parts of the tokens for one group of each rank's experts. Slots are sorted into bins, by
// chunk, rank and expert; in each chunk the other ranks stand in order and this one last. Dropped slots have bin -1.
#pragma once

#include "dtype.h"
#include "select.h"
#include "status.h"

namespace moe {

struct Share {  // of the experts
  int rank;
  int ranks;          // W
  int chunks;         // C
  int local_experts;  // L
  int groups;         // G, gcd(C, L): experts are cut as long as they go, each chunk that shares one reads it again

  MOE_HD int chunk_experts() const { return local_experts / groups; }
  MOE_HD int bins() const { return chunks * ranks * chunk_experts(); }
};

struct BinParams {
  const int32_t* expert_ids;  // (N)
  int32_t* bins;              // (N)
  int64_t slots;
  int64_t chunk_slots;  // of a part of the tokens but the last ones, which may have fewer
  Share share;
};

struct LeavingParams {
  const int32_t* bin_offsets;  // (C W l + 1), as build_index gives them
  int32_t* leaving;            // (W, C, l) rows for each expert; those for this rank's own stay
  Share share;
};

struct ArrivingParams {
  const int32_t* leaving;   // (W, C, l)
  const int32_t* arriving;  // (W, C, l) from each rank, this one too
  int32_t* totals;          // (2, C, W) rows that leave, rows that come; may be the host's
  int32_t* offsets;         // (C, l + 1) of each chunk's rows, by expert
  Share share;
};

struct PlacesParams {
  const int32_t* arriving;  // (W, C, l)
  int32_t* places;          // of each row, by chunk, rank and expert: where in its chunk it stands by expert and rank
  Share share;
};

inline Status check_sizes(const Share& s) {
  const bool fits = s.chunks >= 1 && s.local_experts >= 1 && s.ranks >= 1 && s.rank >= 0 && s.rank < s.ranks &&
                    int64_t(s.ranks) * s.local_experts <= kMaxExperts && s.chunks <= INT32_MAX / kMaxExperts &&
                    s.groups >= 1 && s.chunks % s.groups == 0 && s.local_experts % s.groups == 0;
  return {fits ? Code::kOk : Code::kShare};
}

namespace cuda {
Status bin_slots(const BinParams& params, Stream stream);
Status count_leaving(const LeavingParams& params, Stream stream);
Status count_arriving(const ArrivingParams& params, Stream stream);
Status row_places(const PlacesParams& params, Stream stream);
}  // namespace cuda

}  // namespace moe
