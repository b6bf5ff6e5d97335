// Movement of rows between the ranks of a host, straight into and out of each other's memory. No rank's host waits.
// Shapes: W ranks, E experts, L = E / W of a rank, T tokens, K = top_k, N = T * K slots, R rows that a rank has room for.
//
// A rank keeps the rows of its experts sorted by expert, then by the rank they come from, then as that rank sorted them.
// Slot n of expert e lies with rank e / L, at row shift[e] + inverse_perm[n]. A slot whose id is outside [0, E) is
// dropped: it goes nowhere, and gives 0.
#pragma once

#include "permute.h"

namespace moe {

constexpr int kMaxRanks = 64;
constexpr int kFlagWords = 32;  // from one flag to the next: they do not share a line of the cache

// What a kernel may find wrong. It writes this and a detail to `error` and ends the context with a trap.
enum class Fault : int32_t { kNone = 0, kTimeout = 1, kBuffer = 2, kCapacity = 3 };

// How ranks wait for each other. Every meeting has a number, the same on all of them, as they make the same launches in
// the same order: a rank raises its flag to that number with every other rank, then waits until all flags at home have
// reached it. The number is kept on the device, so a graph that is launched again counts on.
struct Signals {
  const int64_t* flags;    // (W) addresses of every rank's flags, uint32 (W, kFlagWords), zero at first
  uint32_t* state;         // (2) this rank's: the number of its last meeting; blocks that are done
  int32_t* error;         // (2) on the host: a Fault, and the rank or the number that it is about
  int64_t timeout_ns;
  int rank;
  int ranks;
};

// Both, but for one device that plays several ranks: all raise their flags, then each waits.
enum Steps : int { kSignal = 1, kWait = 2 };

// Ranks tell each other how many rows come for each expert; each works out where its own go.
struct TellParams {
  Signals signals;
  int steps;
  const int32_t* own_offsets;  // (E + 1) of this rank's slots, as in index.h
  const int64_t* boards;       // (W) addresses of every rank's board, int32 (2, W, E + 1), which turns take in turn
  int32_t* expert_offsets;     // (L + 1) of the rows that this rank gets
  int32_t* shift;              // (E)
  int64_t capacity;            // R
  int32_t buffer;              // number of the buffer this rank writes to; all must mean the same one
  int experts;
};

struct MeetParams {
  Signals signals;
  int steps;
};

struct Route {
  const int32_t* expert_ids;    // (N)
  const int32_t* inverse_perm;  // (N)
  const int32_t* shift;         // (E)
  int experts;
  int local_experts;            // L
};

// rows of the slot's rank [shift[e] + inverse_perm[n]] = x[n / K], and row_weights there = weights[n]. Then all meet.
struct PushParams {
  Signals signals;
  int steps;
  Route route;
  const void* x;
  const void* weights;         // (T, K) fp32, fp64 for fp64 rows; or null
  const int64_t* rows;         // (W) addresses
  const int64_t* row_weights;  // (W) addresses; or null
  RowShape shape;
};

// y[t] = sum over k of the slots' rows, scalars[t, k] = theirs. All have met before: the rows are ready.
struct PullParams {
  Route route;
  const int64_t* rows;         // (W) addresses; null: no sums
  const int64_t* row_scalars;  // (W) addresses; null: no scalars
  void* y;
  void* scalars;               // (T, K) fp32, fp64 for fp64 rows; a dropped slot's is 0
  RowShape shape;
};

inline Status check_sizes(const Signals& s) {
  if (s.ranks < 1 || s.ranks > kMaxRanks || s.rank < 0 || s.rank >= s.ranks) return {Code::kRanks};
  return {};
}

inline Status check_sizes(const TellParams& p) {
  if (p.experts < 1 || p.experts > kMaxExperts) return {Code::kExperts};
  if (const Status status = check_sizes(p.signals); !status.ok()) return status;
  return {p.experts % p.signals.ranks == 0 ? Code::kOk : Code::kRanks};
}

namespace cuda {
Status tell(const TellParams& params, Stream stream);
Status meet(const MeetParams& params, Stream stream);
Status push(const PushParams& params, Stream stream);
Status pull(const PullParams& params, Stream stream);
}  // namespace cuda

}  // namespace moe
