// Which variant of a product runs for which shape: what was fastest on an H200, and nothing else.
#pragma once

#include "grouped_gemm/sm90/launch.cuh"

namespace moe::cuda::sm90 {

enum class Product { kUp, kDown, kDownBackward, kUpBackward, kWeightGradient };

using Single = Variant<1, 3, 4>;
using High = Variant<1, 3, 2, 3>;
using Pair = Variant<2, 4, 2>;
using SingleInPlace = Variant<1, 3, 5>;  // slots hold what comes in as well

// Calls run(variant) with the variant for so many rows of all experts.
template <Product kProduct, class Run>
Status choose_variant(int64_t rows, int experts, const Run& run) {
  if constexpr (kProduct == Product::kDownBackward) {
    return run(SingleInPlace{});
  } else if constexpr (kProduct == Product::kWeightGradient) {
    return run(Pair{});
  } else {
    // Of few rows an expert most fit in one tile of 192, so its weights are read once.
    constexpr int64_t kFewRows = 160;
    if (rows / experts <= kFewRows) return run(High{});
    return run(Single{});
  }
}

}  // namespace moe::cuda::sm90
