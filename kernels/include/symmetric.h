// Dispatch and combine between the ranks of a host, by stores to and loads from each other's memory. No rank's host waits.
// Shapes: W ranks, E experts, L = E / W of a rank, T tokens, K = top_k, N = T * K slots, R rows of a rank's buffer.
//
// A rank keeps the rows of its experts sorted by expert, then by source rank, then as that rank sorted them. Slot n of
// expert e has its row on rank e / L, at dst_offset[e] + inverse_perm[n]. A slot whose id is outside [0, E) is dropped: it
// has no row, and gives 0.
#pragma once

#include "permute.h"

namespace moe {

constexpr int kMaxRanks = 64;
constexpr int kFlagWords = 32;  // from one flag to the next: they do not share a cache line

// What a kernel may find wrong. It writes this and a detail to `error` and ends the context with a trap.
enum class Fault : int32_t { kNone = 0, kTimeout = 1, kBuffer = 2, kCapacity = 3 };

// The signal pad of a barrier between ranks. Every barrier has an epoch, the same on all ranks, as they make the same
// launches in the same order: a rank sets its flag on every other rank to the epoch, then waits until all flags in its own
// memory have reached it. The epoch is kept on the device, so a CUDA graph that is launched again counts on.
struct Signals {
  const int64_t* flags;  // (W) addresses of every rank's flags, uint32 (W, kFlagWords), zero at first
  uint32_t* state;       // (2) this rank's: the epoch of its last barrier; blocks that have arrived
  int32_t* error;        // (2) on the host: a Fault, and the rank or the number that it is about
  int64_t timeout_ns;
  int rank;
  int ranks;
};

// Both, unless one device plays several ranks: all signal, then each waits.
enum Steps : int { kSignal = 1, kWait = 2 };

// Ranks exchange how many rows they have for each expert; each works out where its own go.
struct ExchangeCountsParams {
  Signals signals;
  int steps;
  const int32_t* own_offsets;  // (E + 1) of this rank's slots, as in routing_index.h
  const int64_t* counts;       // (W) addresses of every rank's counts buffer, int32 (2, W, E + 1): epochs alternate
  int32_t* expert_offsets;     // (L + 1) of the rows that this rank receives
  int32_t* dst_offset;         // (E)
  int64_t capacity;            // R
  int32_t buffer;              // number of the buffer this rank will write to; all ranks must use the same
  int experts;
};

struct BarrierParams {
  Signals signals;
  int steps;
};

struct Route {
  const int32_t* expert_ids;    // (N)
  const int32_t* inverse_perm;  // (N)
  const int32_t* dst_offset;    // (E)
  int experts;
  int local_experts;            // L
};

// On the slot's rank: rows[dst_offset[e] + inverse_perm[n]] = x[n / K], row_weights there = weights[n]. Then a barrier.
struct DispatchParams {
  Signals signals;
  int steps;
  Route route;
  const void* x;
  const void* weights;         // (T, K) fp32, fp64 for fp64 rows; or null
  const int64_t* rows;         // (W) addresses
  const int64_t* row_weights;  // (W) addresses; or null
  RowShape shape;
};

// y[t] = sum over k of the slots' rows, scalars[t, k] = theirs. A barrier must have passed since the rows were written.
struct CombineParams {
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

inline Status check_sizes(const ExchangeCountsParams& p) {
  if (p.experts < 1 || p.experts > kMaxExperts) return {Code::kExperts};
  if (const Status status = check_sizes(p.signals); !status.ok()) return status;
  return {p.experts % p.signals.ranks == 0 ? Code::kOk : Code::kRanks};
}

namespace cuda {
Status exchange_counts(const ExchangeCountsParams& params, Stream stream);
Status barrier(const BarrierParams& params, Stream stream);
Status dispatch(const DispatchParams& params, Stream stream);
Status combine(const CombineParams& params, Stream stream);
}  // namespace cuda

}  // namespace moe
