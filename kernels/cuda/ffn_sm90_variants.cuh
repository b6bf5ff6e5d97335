// How a product is cut and fed, apart from what it computes.
#pragma once

namespace moe::cuda::sm90 {

// Blocks of a cluster, which are neighbours along M and share B; stages that the loads fill; slots of a warpgroup for
// what comes out; and warpgroups that compute 64 rows of a tile each.
template <int kCluster_, int kStages_, int kSlots_, int kGroups_ = 2>
struct Variant {
  static constexpr int kCluster = kCluster_, kStages = kStages_, kSlots = kSlots_, kGroups = kGroups_;
};

}  // namespace moe::cuda::sm90
