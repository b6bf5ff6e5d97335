// The experts' feed-forward network on sm_90a: calls of the kernels chosen for a shape.
#include "grouped_gemm/archs.cuh"
#include "grouped_gemm/sm90/launch.cuh"

namespace moe::cuda::sm90 {
namespace {

// ---- heuristics: the configuration of each GEMM by shape, as measured on an H200 ---------------------------------

enum class Gemm { kUp, kDown, kDownBackward, kUpBackward, kWeightGradient };

using Tile128x256 = TileConfig<1, 3, 4>;
using Tile192x256 = TileConfig<1, 3, 2, 3>;
using Tile128x256Cluster2 = TileConfig<2, 4, 2>;
using Tile128x256ReuseSmem = TileConfig<1, 3, 5>;  // stages D hold the auxiliary input too

// Calls run(config) with the configuration for `rows` rows over all experts.
template <Gemm kGemm, class Run>
Status select_config(int64_t rows, int experts, const Run& run) {
  if constexpr (kGemm == Gemm::kDownBackward) {
    return run(Tile128x256ReuseSmem{});
  } else if constexpr (kGemm == Gemm::kWeightGradient) {
    return run(Tile128x256Cluster2{});
  } else {
    // With few rows per expert most fit in one tile of 192, so the weights are read once.
    constexpr int64_t kFewRows = 160;
    if (rows / experts <= kFewRows) return run(Tile192x256{});
    return run(Tile128x256{});
  }
}

using ffn::dispatch16;

// rows x weights: select the configuration, launch.
template <Gemm kGemm, Major kMajor>
Status run_rows_gemm(const RowsGemm& p, Stream stream) {
  return dispatch16(p.dtype, [&](auto format) {
    return select_config<kGemm>(p.count, p.experts, [&](auto config) {
      return rows_gemm<decltype(format), kMajor, decltype(config)>(p, stream);
    });
  });
}

}  // namespace

bool available() {
  using Down = KernelTraits<Bf16, StoreRows<Bf16>, false, Major::K, Tile128x256>;
  return kernel_available(grouped_gemm_kernel<Down>, Down::kThreads, 90);
}

int64_t ffn_workspace(int64_t num_rows, int64_t hidden_dim) { return ceil_div<int64_t>(hidden_dim, kTileN) * num_rows; }

Status ffn_up(const FfnUpParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  return dispatch16(s, [&](auto format, auto act) {
    return select_config<Gemm::kUp>(s.num_rows, s.experts, [&](auto config) {
      return up<decltype(format), decltype(act), decltype(config)>(p, stream);
    });
  });
}

Status ffn_down(const FfnDownParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  return run_rows_gemm<Gemm::kDown, Major::K>(
      {p.h, p.down, p.expert_offsets, p.out, s.num_rows, s.d_model, s.hidden_dim, s.experts, s.dtype, s.sm_margin}, stream);
}

Status ffn_down_backward(const FfnDownBackwardParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  return dispatch16(s, [&](auto format, auto act) {
    return select_config<Gemm::kDownBackward>(s.num_rows, s.experts, [&](auto config) {
      return down_backward<decltype(format), decltype(act), decltype(config)>(p, stream);
    });
  });
}

Status ffn_up_backward(const FfnUpBackwardParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  return run_rows_gemm<Gemm::kUpBackward, Major::MN>(
      {p.grad_hidden, p.up, p.expert_offsets, p.grad_rows, s.num_rows, s.d_model, ffn_width(s), s.experts, s.dtype,
       s.sm_margin},
      stream);
}

Status ffn_weight_backward(const FfnWeightParams& p, Stream stream) {
  return dispatch16(p.dtype, [&](auto format) {
    return select_config<Gemm::kWeightGradient>(p.num_rows, p.experts, [&](auto config) {
      return weight_grad_gemm<decltype(format), decltype(config)>(p, stream);
    });
  });
}

}  // namespace moe::cuda::sm90
