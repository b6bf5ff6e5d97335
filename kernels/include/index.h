// The routing index: slots sorted by expert, stable, with the offsets of each expert's rows.
// Shapes: N = T * K slots, E experts. Ids outside [0, E) are dropped slots; they stand at the tail.
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

namespace cpu {
inline int64_t index_workspace(int64_t, int) { return 0; }
Status build_index(const IndexParams& params, Stream stream);
}  // namespace cpu

namespace cuda {
int64_t index_workspace(int64_t slots, int experts);  // integers, not bytes
Status build_index(const IndexParams& params, Stream stream);
}  // namespace cuda

}  // namespace moe
