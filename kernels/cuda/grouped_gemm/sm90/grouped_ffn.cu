// The experts' feed-forward network on sm_90a: the configuration of each GEMM, its tensor maps, launch.
#include "grouped_gemm/launchers.cuh"
#include "grouped_gemm/sm90/epilogue_backward.cuh"
#include "grouped_gemm/sm90/kernel.cuh"

namespace moe::cuda::sm90 {
namespace {

using ffn::dispatch16;
using ffn::RowsGemm;

// ---- heuristics: the configuration of each GEMM by shape, as measured on an H200 ---------------------------------

using Tile128x256 = TileConfig<1, 3, 4>;
using Tile192x256 = TileConfig<1, 3, 2, 3>;
using Tile128x256Cluster2 = TileConfig<2, 4, 2>;           // weight gradients
using Tile128x256ReuseSmem = TileConfig<1, 3, 5>;  // backward of down: stages D hold the auxiliary input too

// Calls run(config) for a GEMM of `rows` rows over all experts. With few rows per expert most fit in one tile of 192, so
// the weights are read once.
template <class Run>
Status select_config(const FfnShape& s, const Run& run) {
  constexpr int64_t kFewRows = 160;
  if (s.num_rows / s.experts <= kFewRows) return run(Tile192x256{});
  return run(Tile128x256{});
}

// ---- launch -------------------------------------------------------------------------------------------------------

// Clusters of this kernel that can be active at once; 0 if it cannot run. Opts into the shared memory the first time.
template <class Traits>
int max_active_clusters(size_t shared) {
  static PerDevice<int> known;
  return known.get([=](int) {
    const auto kernel = grouped_gemm_kernel<Traits>;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)) != cudaSuccess) return 0;
    return Launch(Traits::kCluster, Traits::kThreads, shared).cluster(Traits::kCluster).max_active_clusters(kernel);
  });
}

template <class Traits>
Status launch_grouped_gemm(const typename Traits::Params& p, int sm_margin, Stream stream) {
  constexpr size_t kShared = sizeof(SharedStorage<Traits>) + 1024;
  static_assert(kShared <= 227 * 1024, "more shared memory than a block can have");
  if (!kernel_available(grouped_gemm_kernel<Traits>, Traits::kThreads, 90)) return {Code::kArchitecture};
  const int64_t m_tiles = Traits::kKGrouped ? int64_t(p.scheduler.experts) * p.scheduler.m_tiles
                                            : p.scheduler.rows / Traits::kTileM + p.scheduler.experts;
  const int64_t most = m_tiles * p.scheduler.n_tiles;
  if (most > INT32_MAX / 2) return {Code::kSlots};
  const int64_t active = max_active_clusters<Traits>(kShared);
  if (active < 1) return last_error();
  const int64_t clusters = std::min(ffn::within_sm_margin(active, sm_margin), most);
  Launch(unsigned(clusters) * Traits::kCluster, Traits::kThreads, kShared, stream)
      .cluster(Traits::kCluster)
      .pdl(sm_margin == 0)  // an early start of the next kernel would take the margin
      .run(grouped_gemm_kernel<Traits>, p);
  return last_error();
}

ffn::TileSchedulerParams scheduler_params(const int32_t* offsets, int64_t rows, int experts, int64_t columns, int tile_n) {
  return {offsets, experts, int(rows), 0, int(ceil_div<int64_t>(columns, tile_n))};
}

int k_tile_count(int64_t contracted) { return int(ceil_div<int64_t>(contracted, kTileK)); }

template <class Format, class Act, class Config>
Status up_gemm(const FfnUpParams& p, Stream stream) {
  using Traits = KernelTraits<Format, StoreActivation<Format, Act>, false, Major::K, Config>;
  constexpr int kParts = Act::kGated ? 2 : 1;
  const FfnShape& s = p.shape;
  TensorMaps maps(s.dtype);
  typename Traits::Params params{};
  params.a = maps.rows(p.rows, s.num_rows, s.d_model, 1, Traits::kLoadedRows);
  params.b = maps.weights(p.up, s.experts, s.hidden_dim, s.d_model, kParts);
  params.epilogue.h = maps.rows(p.h, s.num_rows, s.hidden_dim, 1);
  params.epilogue.hidden = p.hidden == nullptr ? params.epilogue.h : maps.rows(p.hidden, s.num_rows, s.hidden_dim, kParts);
  params.epilogue.keeps_hidden = p.hidden != nullptr;
  params.epilogue.combine = p.combine;
  params.epilogue.width = int(s.hidden_dim);
  params.scheduler = scheduler_params(p.expert_offsets, s.num_rows, s.experts, s.hidden_dim, kTileN / kParts);
  params.k_tiles = k_tile_count(s.d_model);
  if (!maps.ok()) return {Code::kTensorMap};
  return launch_grouped_gemm<Traits>(params, s.sm_margin, stream);
}

template <class Format, class Act>
Status down_backward_gemm(const FfnDownBackwardParams& p, Stream stream) {
  using Epilogue = StoreActivationBackward<Format, Act>;
  using Traits = KernelTraits<Format, Epilogue, false, Major::MN, Tile128x256ReuseSmem>;
  const FfnShape& s = p.shape;
  TensorMaps maps(s.dtype);
  typename Traits::Params params{};
  params.a = maps.rows(p.grad_out, s.num_rows, s.d_model, 1, Traits::kLoadedRows);
  params.b = maps.weights(p.down, s.experts, s.d_model, s.hidden_dim, 1);
  params.epilogue.hidden = maps.rows(p.hidden, s.num_rows, s.hidden_dim, Epilogue::kParts);
  params.epilogue.grad_hidden = maps.rows(p.grad_hidden, s.num_rows, s.hidden_dim, Epilogue::kParts);
  params.epilogue.h = maps.rows(p.h, s.num_rows, s.hidden_dim, 1);
  params.epilogue.combine = p.combine;
  params.epilogue.partials = p.grad_weights == nullptr ? nullptr : p.workspace;
  params.epilogue.rows = int(s.num_rows);
  params.epilogue.width = int(s.hidden_dim);
  params.scheduler = scheduler_params(p.expert_offsets, s.num_rows, s.experts, s.hidden_dim, kTileN);
  params.k_tiles = k_tile_count(s.d_model);
  if (!maps.ok()) return {Code::kTensorMap};
  const Status status = launch_grouped_gemm<Traits>(params, s.sm_margin, stream);
  if (!status.ok() || p.grad_weights == nullptr) return status;
  return ffn::reduce_partials({p.workspace, p.expert_offsets + s.experts, p.combine.slot_of_row, p.grad_weights,
                               int(s.num_rows), params.scheduler.n_tiles},
                              stream);
}

template <class Format, Major kMajor, class Config>
Status rows_gemm(const RowsGemm& p, Stream stream) {
  using Traits = KernelTraits<Format, StoreRows<Format>, false, kMajor, Config>;
  const auto [outputs, inputs] = kMajor == Major::MN ? std::pair(p.inputs, p.outputs) : std::pair(p.outputs, p.inputs);
  const FfnShape& s = p.shape;
  TensorMaps maps(s.dtype);
  typename Traits::Params params{};
  params.a = maps.rows(p.rows, s.num_rows, p.inputs, 1, Traits::kLoadedRows);
  params.b = maps.weights(p.weights, s.experts, outputs, inputs, 1);
  params.epilogue.out = maps.rows(p.out, s.num_rows, p.outputs, 1);
  params.epilogue.width = int(p.outputs);
  params.scheduler = scheduler_params(p.offsets, s.num_rows, s.experts, p.outputs, kTileN);
  params.k_tiles = k_tile_count(p.inputs);
  if (!maps.ok()) return {Code::kTensorMap};
  return launch_grouped_gemm<Traits>(params, s.sm_margin, stream);
}

template <class Format, bool kFp32>
Status weight_grad_gemm(const FfnWeightParams& p, Stream stream) {
  using Traits = KernelTraits<Format, StoreWeightGrad<Format, kFp32>, true, Major::MN, Tile128x256Cluster2>;
  TensorMaps maps(p.dtype), gradient_maps(kFp32 ? DType::kFp32 : p.dtype);
  typename Traits::Params params{};
  // Without rows nothing is read: any address will do.
  params.a = maps.rows(p.num_rows == 0 ? p.grad_weight : p.grad, p.num_rows, p.outputs, 1);
  params.b = maps.rows(p.num_rows == 0 ? p.grad_weight : p.input, p.num_rows, p.inputs, 1);
  params.epilogue.out = gradient_maps.weights(p.grad_weight, p.experts, p.outputs, p.inputs, 1);
  params.epilogue.outputs = int(p.outputs);
  params.epilogue.inputs = int(p.inputs);
  params.epilogue.accumulate = p.accumulate;
  params.scheduler = scheduler_params(p.expert_offsets, p.num_rows, p.experts, p.inputs, kTileN);
  params.scheduler.m_tiles = int(ceil_div<int64_t>(p.outputs, Traits::kTileM));
  if (!maps.ok() || !gradient_maps.ok()) return {Code::kTensorMap};
  return launch_grouped_gemm<Traits>(params, p.sm_margin, stream);
}

// ---- launchers ----------------------------------------------------------------------------------------------------

template <Major kMajor>
Status select_rows_gemm(const RowsGemm& p, Stream stream) {
  return dispatch16(p.shape.dtype, [&](auto format) {
    return select_config(p.shape, [&](auto config) {
      return rows_gemm<decltype(format), kMajor, decltype(config)>(p, stream);
    });
  });
}

Status up(const FfnUpParams& p, Stream stream) {
  return dispatch16(p.shape, [&](auto format, auto act) {
    return select_config(p.shape, [&](auto config) {
      return up_gemm<decltype(format), decltype(act), decltype(config)>(p, stream);
    });
  });
}

Status down(const FfnDownParams& p, Stream stream) { return select_rows_gemm<Major::K>(ffn::down_gemm(p), stream); }

Status down_backward(const FfnDownBackwardParams& p, Stream stream) {
  return dispatch16(p.shape, [&](auto format, auto act) {
    return down_backward_gemm<decltype(format), decltype(act)>(p, stream);
  });
}

Status up_backward(const FfnUpBackwardParams& p, Stream stream) {
  return select_rows_gemm<Major::MN>(ffn::up_backward_gemm(p), stream);
}

Status weight_backward(const FfnWeightParams& p, Stream stream) {
  return dispatch16(p.dtype, [&](auto format) {
    using Format = decltype(format);
    return p.fp32 ? weight_grad_gemm<Format, true>(p, stream) : weight_grad_gemm<Format, false>(p, stream);
  });
}

bool available() {
  using Down = KernelTraits<Bf16, StoreRows<Bf16>, false, Major::K, Tile128x256>;
  return kernel_available(grouped_gemm_kernel<Down>, Down::kThreads, 90);
}

int64_t workspace(int64_t num_rows, int64_t hidden_dim) { return ceil_div<int64_t>(hidden_dim, kTileN) * num_rows; }

}  // namespace
}  // namespace moe::cuda::sm90

namespace moe::cuda::ffn {
const Launchers sm90_launchers = {sm90::available,     sm90::workspace,   sm90::up,           sm90::down,
                                  sm90::down_backward, sm90::up_backward, sm90::weight_backward};
}  // namespace moe::cuda::ffn
