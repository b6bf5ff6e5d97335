// How a product is cut and fed, apart from what it computes.
#pragma once

namespace moe::cuda::sm90 {

// Blocks of a cluster, which are neighbours along M and share B; stages that the loads fill; slots of a warpgroup for
// what comes out; and warpgroups that compute 64 rows of a tile each.
template <int kCluster_, int kStages_, int kSlots_, int kGroups_ = 2>
struct Variant {
  static constexpr int kCluster = kCluster_, kStages = kStages_, kSlots = kSlots_, kGroups = kGroups_;
  static constexpr bool kAlongN = false;
  static constexpr int kLead = 0;
};

// Blocks of a cluster are neighbours along N and share A: where few rows meet many weights, A is most of what comes
// from the L2 cache again and again.
template <class Base>
struct AlongN : Base {
  static constexpr bool kAlongN = true;
};

// Two warpgroups take turns: the second starts a tile kBlocks blocks of the contraction after the first, which starts
// the next tile when the second has started its last product. So one stores its sums while the other multiplies.
template <class Base, int kBlocks>
struct Leading : Base {
  static constexpr int kLead = kBlocks;
};

}  // namespace moe::cuda::sm90
