// Host side of the grouped GEMM: tensor maps, scheduler parameters, launch.
#pragma once

#include <algorithm>

#include "grouped_gemm/archs.cuh"
#include "grouped_gemm/sm90/epilogue_backward.cuh"
#include "grouped_gemm/sm90/kernel.cuh"

namespace moe::cuda::sm90 {

// Clusters of this kernel that can be active at once; 0 if it cannot run. Queried once per kernel and device, when the
// shared memory is opted into as well.
template <class Traits>
int max_active_clusters(size_t shared) {
  static int known[kMaxDevices] = {};  // a race writes the same number twice
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return 0;
  if (known[device] == 0) {
    const auto kernel = grouped_gemm_kernel<Traits>;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)) != cudaSuccess) return 0;
    cudaLaunchAttribute attribute{};
    set_cluster(attribute, Traits::kCluster);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(Traits::kCluster);
    config.blockDim = dim3(Traits::kThreads);
    config.dynamicSmemBytes = shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) return 0;
    known[device] = clusters;
  }
  return known[device];
}

template <class Traits>
Status launch_grouped_gemm(const typename Traits::Params& p, int sm_margin, Stream stream) {
  static_assert(sizeof(SharedStorage<Traits>) + 1024 <= 227 * 1024, "more shared memory than a block can have");
  constexpr size_t kShared = sizeof(SharedStorage<Traits>) + 1024;
  if (!kernel_available(grouped_gemm_kernel<Traits>, Traits::kThreads, 90)) return {Code::kArchitecture};
  const int64_t m_tiles = Traits::kKGrouped ? int64_t(p.scheduler.experts) * p.scheduler.m_tiles
                                               : p.scheduler.rows / Traits::kTileM + p.scheduler.experts;
  const int64_t most = m_tiles * p.scheduler.n_tiles;
  if (most > INT32_MAX / 2) return {Code::kSlots};
  const int64_t active = max_active_clusters<Traits>(kShared);
  if (active < 1) return last_error();
  const int64_t clusters = std::min(ffn::within_sm_margin(active, sm_margin), most);
  cudaLaunchAttribute attributes[2] = {};
  set_cluster(attributes[0], Traits::kCluster);
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  // With a margin the next kernel must not start early: it would take the multiprocessors left free.
  attributes[1].val.programmaticStreamSerializationAllowed = sm_margin > 0 ? 0 : 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(clusters) * Traits::kCluster);
  config.blockDim = dim3(Traits::kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = native(stream);
  config.attrs = attributes;
  config.numAttrs = 2;
  cudaLaunchKernelEx(&config, grouped_gemm_kernel<Traits>, p);  // last_error() reports its error
  return last_error();
}

inline ffn::TileSchedulerParams scheduler_params(const int32_t* offsets, int64_t rows, int experts, int64_t columns, int tile_n) {
  return {offsets, experts, int(rows), 0, int(ceil_div<int64_t>(columns, tile_n))};
}

inline int k_tile_count(int64_t contracted) { return int(ceil_div<int64_t>(contracted, kTileK)); }

template <class Format, class Act, class Config>
Status up(const FfnUpParams& p, Stream stream) {
  using Out = StoreActivation<Format, Act>;
  using Chosen = KernelTraits<Format, Out, false, Major::K, Config>;
  constexpr int kParts = Act::kGated ? 2 : 1;
  const FfnShape& s = p.shape;
  TensorMaps maps(s.dtype);
  typename Chosen::Params params{};
  params.a = maps.rows(p.rows, s.num_rows, s.d_model, 1, Chosen::kLoadedRows);
  params.b = maps.weights(p.up, s.experts, s.hidden_dim, s.d_model, kParts);
  params.epilogue.h = maps.rows(p.h, s.num_rows, s.hidden_dim, 1);
  params.epilogue.hidden = p.hidden == nullptr ? params.epilogue.h : maps.rows(p.hidden, s.num_rows, s.hidden_dim, kParts);
  params.epilogue.keeps_hidden = p.hidden != nullptr;
  params.epilogue.combine = p.combine;
  params.epilogue.width = int(s.hidden_dim);
  params.scheduler = scheduler_params(p.expert_offsets, s.num_rows, s.experts, s.hidden_dim, kTileN / kParts);
  params.k_tiles = k_tile_count(s.d_model);
  if (!maps.ok()) return {Code::kTensorMap};
  return launch_grouped_gemm<Chosen>(params, s.sm_margin, stream);
}

template <class Format, class Act, class Config>
Status down_backward(const FfnDownBackwardParams& p, Stream stream) {
  using Out = StoreActivationBackward<Format, Act>;
  using Chosen = KernelTraits<Format, Out, false, Major::MN, Config>;
  const FfnShape& s = p.shape;
  TensorMaps maps(s.dtype);
  typename Chosen::Params params{};
  params.a = maps.rows(p.grad_out, s.num_rows, s.d_model, 1, Chosen::kLoadedRows);
  params.b = maps.weights(p.down, s.experts, s.d_model, s.hidden_dim, 1);
  params.epilogue.hidden = maps.rows(p.hidden, s.num_rows, s.hidden_dim, Out::kParts);
  params.epilogue.grad_hidden = maps.rows(p.grad_hidden, s.num_rows, s.hidden_dim, Out::kParts);
  params.epilogue.h = maps.rows(p.h, s.num_rows, s.hidden_dim, 1);
  params.epilogue.combine = p.combine;
  params.epilogue.partials = p.grad_weights == nullptr ? nullptr : p.workspace;
  params.epilogue.rows = int(s.num_rows);
  params.epilogue.width = int(s.hidden_dim);
  params.scheduler = scheduler_params(p.expert_offsets, s.num_rows, s.experts, s.hidden_dim, kTileN);
  params.k_tiles = k_tile_count(s.d_model);
  if (!maps.ok()) return {Code::kTensorMap};
  if (const Status status = launch_grouped_gemm<Chosen>(params, s.sm_margin, stream); !status.ok() || p.grad_weights == nullptr) {
    return status;
  }
  return ffn::reduce_partials({p.workspace, p.expert_offsets + s.experts, p.combine.slot_of_row, p.grad_weights, int(s.num_rows),
                        params.scheduler.n_tiles},
                       stream);
}

// out (N, outputs) = rows (N, inputs) x weights. Weights are (E, outputs, inputs), or (E, inputs, outputs) for MN.
struct RowsGemm {
  const void* rows;
  const void* weights;
  const int32_t* offsets;
  void* out;
  int64_t count, outputs, inputs;
  int experts;
  DType dtype;
  int sm_margin;
};

template <class Format, Major kMajor, class Config>
Status rows_gemm(const RowsGemm& p, Stream stream) {
  using Chosen = KernelTraits<Format, StoreRows<Format>, false, kMajor, Config>;
  constexpr bool kTransposed = kMajor == Major::MN;
  TensorMaps maps(p.dtype);
  typename Chosen::Params params{};
  params.a = maps.rows(p.rows, p.count, p.inputs, 1, Chosen::kLoadedRows);
  params.b = maps.weights(p.weights, p.experts, kTransposed ? p.inputs : p.outputs,
                          kTransposed ? p.outputs : p.inputs, 1);
  params.epilogue.out = maps.rows(p.out, p.count, p.outputs, 1);
  params.epilogue.width = int(p.outputs);
  params.scheduler = scheduler_params(p.offsets, p.count, p.experts, p.outputs, kTileN);
  params.k_tiles = k_tile_count(p.inputs);
  if (!maps.ok()) return {Code::kTensorMap};
  return launch_grouped_gemm<Chosen>(params, p.sm_margin, stream);
}

template <class Format, class Config>
Status weight_grad_gemm(const FfnWeightParams& p, Stream stream) {
  using Chosen = KernelTraits<Format, StoreWeightGrad<Format>, true, Major::MN, Config>;
  TensorMaps maps(p.dtype);
  typename Chosen::Params params{};
  // Without rows nothing is read: any address will do.
  params.a = maps.rows(p.num_rows == 0 ? p.grad_weight : p.grad, p.num_rows, p.outputs, 1);
  params.b = maps.rows(p.num_rows == 0 ? p.grad_weight : p.input, p.num_rows, p.inputs, 1);
  params.epilogue.out = maps.weights(p.grad_weight, p.experts, p.outputs, p.inputs, 1);
  params.epilogue.outputs = int(p.outputs);
  params.epilogue.inputs = int(p.inputs);
  params.scheduler = scheduler_params(p.expert_offsets, p.num_rows, p.experts, p.inputs, kTileN);
  params.scheduler.m_tiles = int(ceil_div<int64_t>(p.outputs, Chosen::kTileM));
  if (!maps.ok()) return {Code::kTensorMap};
  return launch_grouped_gemm<Chosen>(params, p.sm_margin, stream);
}

}  // namespace moe::cuda::sm90
