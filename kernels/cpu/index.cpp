// The routing index on the CPU: a counting sort over E + 1 bins, the last for dropped slots.
#include "routing_index.h"

namespace moe::cpu {

Status build_index(const IndexParams& p, Stream) {
  if (const Status status = check_sizes(p); !status.ok()) return status;
  const uint32_t experts = uint32_t(p.experts);
  const int32_t slots = int32_t(p.slots);
  // As unsigned, every id outside [0, E) is too large, -1 included.
  const auto bin = [&](int32_t slot) {
    const uint32_t id = uint32_t(p.expert_ids[slot]);
    return id < experts ? id : experts;
  };

  int32_t next[kMaxExperts + 1] = {};  // the count of each bin, then the next free row in it
  for (int32_t slot = 0; slot < slots; ++slot) ++next[bin(slot)];
  int32_t start = 0;
  for (uint32_t b = 0; b <= experts; ++b) {
    const int32_t count = next[b];
    p.expert_offsets[b] = next[b] = start;
    start += count;
  }
  for (int32_t slot = 0; slot < slots; ++slot) {
    const int32_t row = next[bin(slot)]++;
    p.perm[row] = slot;
    p.inverse_perm[slot] = row;
  }
  return {};
}

}  // namespace moe::cpu
