// The experts' feed-forward network on sm_80 and newer: operands of each GEMM, launch.
#include "grouped_gemm/launchers.cuh"
#include "grouped_gemm/sm80/kernel.cuh"

namespace moe::cuda::sm80 {
namespace {

using Config = TileConfig<2, 4, 2>;  // of those tried, the fastest

const uint16_t* in(const void* data) { return static_cast<const uint16_t*>(data); }
uint16_t* out(void* data) { return static_cast<uint16_t*>(data); }

template <class T>
struct Type {
  using type = T;
};

// Blocks of this kernel that can be active at once; 0 if it cannot run. Opts into the shared memory the first time.
template <class Traits>
int max_active_blocks() {
  static PerDevice<int> known;
  return known.get([](int) {
    const auto kernel = grouped_gemm_kernel<Traits>;
    int blocks = 0;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kShared) != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Traits::kThreads, Traits::kShared) != cudaSuccess) {
      return 0;
    }
    return blocks * num_sms();
  });
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

ffn::TileSchedulerParams scheduler_params(const int32_t* offsets, int experts, int64_t rows) {
  return {offsets, experts, int(rows), 0, 0};
}

Status up(const FfnUpParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  return ffn::dispatch16(s, [&](auto format, auto act) {
    using Epilogue = StoreActivation<decltype(format), decltype(act)>;
    return launch_grouped_gemm<KernelTraits<decltype(format), Epilogue, false, Major::kK, Config>>(
        {in(p.rows), in(p.up), {out(p.hidden), out(p.h), p.combine},
         scheduler_params(p.expert_offsets, s.experts, s.num_rows), 0, int(s.hidden_dim), int(s.d_model)},
        s.sm_margin, stream);
  });
}

template <Major kMajor>
Status rows_gemm(const ffn::RowsGemm& p, Stream stream) {
  const FfnShape& s = p.shape;
  return ffn::dispatch16(s.dtype, [&](auto format) {
    return launch_grouped_gemm<KernelTraits<decltype(format), StoreRows<decltype(format)>, false, kMajor, Config>>(
        {in(p.rows), in(p.weights), {out(p.out)}, scheduler_params(p.offsets, s.experts, s.num_rows), 0, int(p.outputs),
         int(p.inputs)},
        s.sm_margin, stream);
  });
}

Status down(const FfnDownParams& p, Stream stream) { return rows_gemm<Major::kK>(ffn::down_gemm(p), stream); }

Status down_backward(const FfnDownBackwardParams& p, Stream stream) {
  const FfnShape& s = p.shape;
  const Status status = ffn::dispatch16(s, [&](auto format, auto act) {
    using Epilogue = StoreActivationBackward<decltype(format), decltype(act)>;
    const typename Epilogue::Params epilogue{in(p.hidden), out(p.grad_hidden), out(p.h), p.combine,
                                             p.grad_weights == nullptr ? nullptr : p.workspace, int(s.num_rows)};
    return launch_grouped_gemm<KernelTraits<decltype(format), Epilogue, false, Major::kMN, Config>>(
        {in(p.grad_out), in(p.down), epilogue, scheduler_params(p.expert_offsets, s.experts, s.num_rows), 0,
         int(s.hidden_dim), int(s.d_model)},
        s.sm_margin, stream);
  });
  if (!status.ok() || p.grad_weights == nullptr) return status;
  return ffn::reduce_partials({p.workspace, p.expert_offsets + s.experts, p.combine.slot_of_row, p.grad_weights,
                               int(s.num_rows), int(ceil_div<int64_t>(s.hidden_dim, kWarpTile))},
                              stream);
}

Status up_backward(const FfnUpBackwardParams& p, Stream stream) {
  return rows_gemm<Major::kMN>(ffn::up_backward_gemm(p), stream);
}

Status weight_backward(const FfnWeightParams& p, Stream stream) {
  return ffn::dispatch16(p.dtype, [&](auto format) {
    using Format = decltype(format);
    const auto gemm = [&](auto epilogue, auto params) {
      return launch_grouped_gemm<KernelTraits<Format, typename decltype(epilogue)::type, true, Major::kMN, Config>>(
          {in(p.grad), in(p.input), params, scheduler_params(p.expert_offsets, p.experts, p.num_rows), int(p.outputs),
           int(p.inputs), 0},
          p.sm_margin, stream);
    };
    if (!p.fp32) return gemm(Type<StoreRows<Format>>{}, typename StoreRows<Format>::Params{out(p.grad_weight)});
    return gemm(Type<StoreFp32>{}, StoreFp32::Params{static_cast<float*>(p.grad_weight), p.accumulate});
  });
}

bool available() {
  using Down = KernelTraits<Bf16, StoreRows<Bf16>, false, Major::kK, Config>;
  return kernel_available(grouped_gemm_kernel<Down>, Down::kThreads, 80);
}

int64_t workspace(int64_t num_rows, int64_t hidden_dim) { return ceil_div<int64_t>(hidden_dim, kWarpTile) * num_rows; }

}  // namespace
}  // namespace moe::cuda::sm80

namespace moe::cuda::ffn {
const Launchers sm80_launchers = {sm80::available,     sm80::workspace,   sm80::up,           sm80::down,
                                  sm80::down_backward, sm80::up_backward, sm80::weight_backward};
}  // namespace moe::cuda::ffn
