// The experts' feed-forward network on sm_90a: calls of the kernels chosen for a shape.
#include "grouped_gemm/archs.cuh"
#include "grouped_gemm/sm90/launch.cuh"

namespace moe::cuda::sm90 {
namespace {

// ---- heuristics: the configuration of each GEMM by shape, as measured on an H200 ---------------------------------

enum class Product { kUp, kDown, kDownBackward, kUpBackward, kWeightGradient };

using Single = TileConfig<1, 3, 4>;
using High = TileConfig<1, 3, 2, 3>;
using Pair = TileConfig<2, 4, 2>;
using SingleInPlace = TileConfig<1, 3, 5>;  // smem_d hold what comes in as well

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

using ffn::dispatch16;

// Rows by weights, chosen and last_error.
template <Product kProduct, Major kMajor>
Status multiply(const RowProduct& p, Stream stream) {
  return dispatch16(p.dtype, [&](auto format) {
    return choose_variant<kProduct>(p.count, p.experts, [&](auto variant) {
      return rows_by_weights<decltype(format), kMajor, decltype(variant)>(p, stream);
    });
  });
}

}  // namespace

bool available() {
  using Down = KernelTraits<Bf16, RowsOut<Bf16>, false, Major::K, Single>;
  return kernel_available(grouped_gemm_kernel<Down>, Down::kThreads, 90);
}

int64_t ffn_workspace(const FfnShape& s) { return ceil_div<int64_t>(s.hidden, kTileN) * s.rows; }

Status ffn_up(const FfnUpParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  return dispatch16(s, [&](auto format, auto act) {
    return choose_variant<Product::kUp>(s.rows, s.experts, [&](auto variant) {
      return up<decltype(format), decltype(act), decltype(variant)>(p, stream);
    });
  });
}

Status ffn_down(const FfnDownParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  return multiply<Product::kDown, Major::K>(
      {p.h, p.down, p.expert_offsets, p.out, s.rows, s.d_model, s.hidden, s.experts, s.dtype}, stream);
}

Status ffn_down_backward(const FfnDownBackwardParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  return dispatch16(s, [&](auto format, auto act) {
    return choose_variant<Product::kDownBackward>(s.rows, s.experts, [&](auto variant) {
      return down_backward<decltype(format), decltype(act), decltype(variant)>(p, stream);
    });
  });
}

Status ffn_up_backward(const FfnUpBackwardParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  return multiply<Product::kUpBackward, Major::MN>(
      {p.grad_hidden, p.up, p.expert_offsets, p.grad_rows, s.rows, s.d_model, ffn_width(s), s.experts, s.dtype},
      stream);
}

Status ffn_weight_backward(const FfnWeightParams& p, Stream stream) {
  return dispatch16(p.dtype, [&](auto format) {
    return choose_variant<Product::kWeightGradient>(p.rows, p.experts, [&](auto variant) {
      return weight_gradient<decltype(format), decltype(variant)>(p, stream);
    });
  });
}

}  // namespace moe::cuda::sm90
