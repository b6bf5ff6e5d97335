// How a product is cut and fed, apart from what it computes. A shape chooses its own; a benchmark can ask for others.
#pragma once

namespace moe::cuda::sm90 {

// Blocks of a cluster, stages that the loads fill, slots of a warpgroup for what comes out, and warpgroups that compute
// 64 rows of a tile each.
template <int kCluster_, int kStages_, int kSlots_, int kGroups_ = 2>
struct Variant {
  static constexpr int kCluster = kCluster_, kStages = kStages_, kSlots = kSlots_, kGroups = kGroups_;
  static constexpr bool kAlongN = false;
  static constexpr int kFetches = 0, kLead = 0;
};

// Blocks of a cluster are neighbours along N and share A, instead of neighbours along M that share B: no expert's rows
// are rounded up to two tiles.
template <class Base>
struct AlongN : Base {
  static constexpr bool kAlongN = true;
};

// Weights come into the L2 cache kBlocks blocks of the contraction at a time, 128 kBlocks bytes in a row, before they
// are loaded from there.
template <class Base, int kBlocks>
struct Fetching : Base {
  static constexpr int kFetches = kBlocks;
};

// Two warpgroups take turns: the second starts a tile kBlocks blocks after the first, which starts the next tile when
// the second has started its last product. So one stores its sums while the other multiplies.
template <class Base, int kBlocks>
struct Leading : Base {
  static constexpr int kLead = kBlocks;
};

}  // namespace moe::cuda::sm90
