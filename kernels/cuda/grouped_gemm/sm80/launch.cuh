// Host side of the grouped GEMM on sm_80: operands of each function, launch.
#pragma once

#include <algorithm>

#include "grouped_gemm/sm80/kernel.cuh"
#include "grouped_gemm/archs.cuh"

namespace moe::cuda::sm80 {

inline const uint16_t* in(const void* data) { return static_cast<const uint16_t*>(data); }
inline uint16_t* out(void* data) { return static_cast<uint16_t*>(data); }

// Blocks of this kernel that can be active at once; 0 if it cannot run. Queried once per kernel and device, when the
// shared memory is opted into as well.
template <class Traits>
int max_active_blocks() {
  static int known[kMaxDevices] = {};  // a race writes the same number twice
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return 0;
  if (known[device] == 0) {
    const auto kernel = grouped_gemm_kernel<Traits>;
    int blocks = 0;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kShared) != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Traits::kThreads, Traits::kShared) != cudaSuccess) {
      return 0;
    }
    known[device] = blocks * num_sms();
  }
  return known[device];
}

template <class Traits>
Status launch_grouped_gemm(typename Traits::Params p, int sm_margin, Stream stream) {
  p.scheduler.n_tiles = ceil_div(p.width, Traits::kTileColumns);
  p.scheduler.m_tiles = Traits::kKGrouped ? ceil_div(p.outputs, kTileM) : 0;
  const int64_t m_tiles = Traits::kKGrouped ? int64_t(p.scheduler.experts) * p.scheduler.m_tiles
                                               : p.scheduler.rows / kTileM + p.scheduler.experts;
  const int64_t most = m_tiles * p.scheduler.n_tiles;
  if (most > INT32_MAX / 2) return {Code::kSlots};
  const int64_t blocks = std::min(ffn::within_sm_margin(max_active_blocks<Traits>(), sm_margin), most);
  if (blocks < 1) {
    const Status status = last_error();
    return status.ok() ? Status{Code::kArchitecture} : status;
  }
  grouped_gemm_kernel<Traits><<<unsigned(blocks), Traits::kThreads, Traits::kShared, native(stream)>>>(p);
  return last_error();
}

template <class Format, Major kMajorB, class V>
using RowsTraits = KernelTraits<Format, StoreRows<Format>, false, kMajorB, V>;

inline ffn::TileSchedulerParams scheduler_params(const int32_t* offsets, int experts, int64_t rows) {
  return {offsets, experts, int(rows), 0, 0};
}

template <class V>
Status up(const FfnUpParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  return ffn::dispatch16(s, [&](auto format, auto act) {
    using Config = KernelTraits<decltype(format), StoreActivation<decltype(format), decltype(act)>, false, Major::kK, V>;
    return launch_grouped_gemm<Config>({in(p.rows), in(p.up), {out(p.hidden), out(p.h), p.combine},
                                   scheduler_params(p.expert_offsets, s.experts, s.num_rows), 0, int(s.hidden_dim), int(s.d_model)},
                                  s.sm_margin, stream);
  });
}

template <class V>
Status down(const FfnDownParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  return ffn::dispatch16(s.dtype, [&](auto format) {
    return launch_grouped_gemm<RowsTraits<decltype(format), Major::kK, V>>(
        {in(p.h), in(p.down), {out(p.out)}, scheduler_params(p.expert_offsets, s.experts, s.num_rows), 0, int(s.d_model),
         int(s.hidden_dim)},
        s.sm_margin, stream);
  });
}

template <class V>
Status down_backward(const FfnDownBackwardParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  const Status status = ffn::dispatch16(s, [&](auto format, auto act) {
    using Out = StoreActivationBackward<decltype(format), decltype(act)>;
    const typename Out::Params epilogue{in(p.hidden), out(p.grad_hidden), out(p.h), p.combine,
                                        p.grad_weights == nullptr ? nullptr : p.workspace, int(s.num_rows)};
    return launch_grouped_gemm<KernelTraits<decltype(format), Out, false, Major::kMN, V>>(
        {in(p.grad_out), in(p.down), epilogue, scheduler_params(p.expert_offsets, s.experts, s.num_rows), 0, int(s.hidden_dim),
         int(s.d_model)},
        s.sm_margin, stream);
  });
  if (!status.ok() || p.grad_weights == nullptr) return status;
  return ffn::reduce_partials({p.workspace, p.expert_offsets + s.experts, p.combine.slot_of_row, p.grad_weights, int(s.num_rows),
                        int(ceil_div<int64_t>(s.hidden_dim, kWarpTile))},
                       stream);
}

template <class V>
Status up_backward(const FfnUpBackwardParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  return ffn::dispatch16(s.dtype, [&](auto format) {
    return launch_grouped_gemm<RowsTraits<decltype(format), Major::kMN, V>>(
        {in(p.grad_hidden), in(p.up), {out(p.grad_rows)}, scheduler_params(p.expert_offsets, s.experts, s.num_rows), 0,
         int(s.d_model), int(ffn_width(s))},
        s.sm_margin, stream);
  });
}

template <class V>
Status weight_backward(const FfnWeightParams& p, Stream stream) {
  return ffn::dispatch16(p.dtype, [&](auto format) {
    return launch_grouped_gemm<KernelTraits<decltype(format), StoreRows<decltype(format)>, true, Major::kMN, V>>(
        {in(p.grad), in(p.input), {out(p.grad_weight)}, scheduler_params(p.expert_offsets, p.experts, p.num_rows),
         int(p.outputs), int(p.inputs), 0},
        p.sm_margin, stream);
  });
}

}  // namespace moe::cuda::sm80
