// A warp finds the groups of experts that a row selects from: those with the highest sums of their two best scores.
#pragma once

#include "select/select_launch.cuh"

namespace moe::cuda {

// Order: score descending, then id ascending; -0 equals +0, as they are compared as numbers. Without a branch.
template <class Real>
__device__ __forceinline__ bool before(Real score, int id, Real other, int other_id) {
  return (score > other) | ((score == other) & (id < other_id));
}

template <class Real>
struct BestTwo {
  Real first = -INFINITY, second = -INFINITY;

  __device__ void add(Real score) {
    second = max(second, min(first, score));
    first = max(first, score);
  }
  __device__ __forceinline__ void merge_lanes(int count) {
#pragma unroll
    for (int apart = 1; apart < count; apart *= 2) {
      const Real other = __shfl_xor_sync(kFullMask, first, apart);
      second = max(max(second, __shfl_xor_sync(kFullMask, second, apart)), min(first, other));
      first = max(first, other);
    }
  }
  __device__ Real sum(int size) const { return size == 1 ? first : first + second; }
};

template <class Real>
struct WarpGroups {
  int count, wanted, size;
  int lane;
  int shift;       // 1 << this lanes add up the scores of a group, a power of two that divides its size
  int first_step;  // each group begins at another one: other banks of shared memory

  __device__ WarpGroups(const SelectLaunch& p, int lane)
      : count(p.n_group), wanted(p.topk_group), size(p.experts / p.n_group), lane(lane), shift(0) {
    while (count << (shift + 1) <= kWarp && size % (2 << shift) == 0) ++shift;
    first_step = (lane >> shift) % (size >> shift);
  }

  __device__ bool is_kept(unsigned groups, int id) const { return groups >> (id / size) & 1; }

  // A bit per group, whether it is one of the best, by score(expert).
  template <class ScoreOf>
  __device__ unsigned best(const ScoreOf& score) const {
    const int own = lane >> shift, steps = size >> shift;
    const int begin = own * size + (lane & ((1 << shift) - 1));
    BestTwo<Real> of_lane;
    if (own < count) {
      int step = first_step;
#pragma unroll 4
      for (int i = 0; i < steps; ++i) {
        of_lane.add(score(begin + (step << shift)));
        step = step + 1 == steps ? 0 : step + 1;
      }
    }
    of_lane.merge_lanes(1 << shift);
    Real sum = of_lane.sum(size);
    sum = sum == sum ? sum : Real(-INFINITY);
    const unsigned lanes = __ballot_sync(kFullMask, is_best(sum, own, shift));
    return __ballot_sync(kFullMask, lane < count && (lanes >> (lane << shift) & 1));
  }

  // Of a group's sum; that of group g is in lane g << lanes_shift.
  __device__ bool is_best(Real sum, int group, int lanes_shift) const {
    int better = 0;
#pragma unroll 4
    for (int g = 0; g < count; ++g) better += before(__shfl_sync(kFullMask, sum, g << lanes_shift), g, sum, group);
    return better < wanted;
  }
};

}  // namespace moe::cuda
