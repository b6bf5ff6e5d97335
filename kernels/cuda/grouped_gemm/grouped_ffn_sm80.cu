// The experts' feed-forward network on sm_80 and newer: which kernel runs.
#include "grouped_gemm/archs.cuh"
#include "grouped_gemm/sm80/launch.cuh"

namespace moe::cuda::sm80 {
namespace {

using Config = TileConfig<2, 4, 2>;  // of those tried, the fastest

}  // namespace

bool available() {
  using Down = RowsTraits<Bf16, Major::kK, Config>;
  return kernel_available(grouped_gemm_kernel<Down>, Down::kThreads, 80);
}

int64_t ffn_workspace(int64_t num_rows, int64_t hidden_dim) { return ceil_div<int64_t>(hidden_dim, kWarpTile) * num_rows; }

Status ffn_up(const FfnUpParams& p, Stream stream) { return up<Config>(p, stream); }
Status ffn_down(const FfnDownParams& p, Stream stream) { return down<Config>(p, stream); }
Status ffn_down_backward(const FfnDownBackwardParams& p, Stream stream) { return down_backward<Config>(p, stream); }
Status ffn_up_backward(const FfnUpBackwardParams& p, Stream stream) { return up_backward<Config>(p, stream); }
Status ffn_weight_backward(const FfnWeightParams& p, Stream stream) { return weight_backward<Config>(p, stream); }

}  // namespace moe::cuda::sm80
