// The routing index: slots sorted by expert, stable, with the offsets of each expert's rows. And the counts of an all-to-all
// between ranks.
// Shapes: N = T * K slots, E experts. Ids outside [0, E) are dropped slots; they come last.
#pragma once

#include "select.h"
#include "status.h"

namespace moe {

struct IndexParams {
  const int32_t* expert_ids;  // (N)
  int32_t* expert_offsets;    // (E + 1), exclusive, starts at 0
  int32_t* perm;              // (N) sorted row -> slot
  int32_t* inverse_perm;      // (N) slot -> sorted row
  int32_t* workspace;         // CUDA: index_workspace(N, E) integers; CPU: unused
  int64_t slots;
  int experts;
};

inline Status check_sizes(const IndexParams& p) {
  if (p.experts < 1 || p.experts > kMaxExperts) return {Code::kExperts};
  if (p.slots < 0 || p.slots > INT32_MAX) return {Code::kSlots};
  return {};
}

// ---- all-to-all between ranks --------------------------------------------------------------------------------------
// Shapes: W ranks, L = E / W of a rank, C chunks, G groups of l = L / G experts.
// A chunk is one of C / G parts of the tokens for one group of each rank's experts. Slots are sorted into buckets, by
// chunk, peer and expert; peers are the other ranks in order, then this one. A dropped slot has bucket -1.

struct EpLayout {
  int rank;
  int ranks;          // W
  int chunks;         // C
  int local_experts;  // L
  int groups;         // G, gcd(C, L): experts are split before tokens, as each chunk of a group reads its weights again

  MOE_HD int chunk_experts() const { return local_experts / groups; }
  MOE_HD int buckets() const { return chunks * ranks * chunk_experts(); }
};

struct BucketSlotsParams {
  const int32_t* expert_ids;  // (N)
  int32_t* buckets;           // (N)
  int64_t slots;              // N
  int64_t chunk_slots;        // of a part of the tokens; the last one may have fewer
  EpLayout layout;
};

struct SendCountsParams {
  const int32_t* bucket_offsets;  // (C W l + 1), from build_index
  int32_t* send_counts;           // (W, C, l) rows for each expert, this rank's own included
  EpLayout layout;
};

struct RecvOffsetsParams {
  const int32_t* send_counts;  // (W, C, l)
  const int32_t* recv_counts;  // (W, C, l) from each rank, this one included
  int32_t* totals;             // (2, C, W) rows to send and to receive; may be host memory
  int32_t* offsets;            // (C, l + 1) of each chunk's rows, by expert
  EpLayout layout;
};

struct RecvPermutationParams {
  const int32_t* recv_counts;  // (W, C, l)
  int32_t* perm;               // of each row, by chunk, peer and expert: its place within the chunk, by expert and peer
  EpLayout layout;
};

inline Status check_sizes(const EpLayout& s) {
  const bool fits = s.chunks >= 1 && s.local_experts >= 1 && s.ranks >= 1 && s.rank >= 0 && s.rank < s.ranks &&
                    int64_t(s.ranks) * s.local_experts <= kMaxExperts && s.chunks <= INT32_MAX / kMaxExperts &&
                    s.groups >= 1 && s.chunks % s.groups == 0 && s.local_experts % s.groups == 0;
  return {fits ? Code::kOk : Code::kLayout};
}

namespace cpu {
inline int64_t index_workspace(int64_t, int) { return 0; }
Status build_index(const IndexParams& params, Stream stream);
}  // namespace cpu

namespace cuda {
int64_t index_workspace(int64_t slots, int experts);  // integers, not bytes
Status build_index(const IndexParams& params, Stream stream);
Status bucket_slots(const BucketSlotsParams& params, Stream stream);
Status send_counts(const SendCountsParams& params, Stream stream);
Status recv_offsets(const RecvOffsetsParams& params, Stream stream);
Status recv_permutation(const RecvPermutationParams& params, Stream stream);
}  // namespace cuda

}  // namespace moe
