// The module moe_lightning._cuda. It imports without a driver and without a GPU; device_count() then says why nothing can
// run.
#include <cuda_runtime_api.h>

#include "adamw.h"
#include "common.h"
#include "gate.h"
#include "permute.h"
#include "sinkhorn.h"
#include "symmetric.h"
#ifdef MOE_CUTLASS
#include <cutlass/version.h>

#include "grouped_ffn.h"
#endif

namespace moe {

MOE_FIELDS(SinkhornParams, logits, scores, workspace, tokens, experts, dtype, iterations, temperature, tolerance,
           row_stride)

// ---- gate and optimizer --------------------------------------------------------------------------------------------

MOE_FIELDS(SplitBf16Params, value, parts, rows, cols, part_stride, row_stride, count, order)
MOE_FIELDS(SumPartsParams, parts, sum, rows, cols, part_stride, row_stride)
MOE_FIELDS(AdamWParams, tensors, gradient_scale, size, learning_rate, beta1, beta2, epsilon, weight_decay)

// ---- movement of rows ----------------------------------------------------------------------------------------------

MOE_FIELDS(RowShape, tokens, width, top_k, dtype)
MOE_FIELDS(PermuteParams, x, second_x, first_tokens, inverse_perm, rows, shape)
MOE_FIELDS(SplitRowsParams, rows, inverse_perm, first, second, first_rows, shape)
MOE_FIELDS(UnpermuteParams, rows, weights, inverse_perm, kept_rows, y, shape)
MOE_FIELDS(UnpermuteBackwardParams, grad_y, rows, weights, inverse_perm, kept_rows, grad_rows, grad_weights, shape)

// ---- between ranks -------------------------------------------------------------------------------------------------

MOE_FIELDS(EpLayout, rank, ranks, chunks, local_experts, groups)
MOE_FIELDS(BucketSlotsParams, expert_ids, buckets, slots, chunk_slots, layout)
MOE_FIELDS(SendCountsParams, bucket_offsets, send_counts, layout)
MOE_FIELDS(RecvOffsetsParams, send_counts, recv_counts, totals, offsets, layout)
MOE_FIELDS(RecvPermutationParams, recv_counts, perm, layout)
MOE_FIELDS(Signals, flags, state, error, timeout_ns, rank, ranks)
MOE_FIELDS(Route, expert_ids, inverse_perm, dst_offset, experts, local_experts)
MOE_FIELDS(ExchangeCountsParams, signals, steps, own_offsets, counts, expert_offsets, dst_offset, capacity, buffer,
           experts)
MOE_FIELDS(BarrierParams, signals, steps)
MOE_FIELDS(DispatchParams, signals, steps, route, x, weights, rows, row_weights, shape)
MOE_FIELDS(CombineParams, route, rows, row_scalars, y, scalars, shape)

// ---- the experts' feed-forward network -----------------------------------------------------------------------------

#ifdef MOE_CUTLASS
MOE_FIELDS(FfnShape, num_rows, d_model, hidden_dim, experts, activation, dtype, sm_margin)
MOE_FIELDS(RowWeights, weights, slot_of_row)
MOE_FIELDS(FfnUpParams, rows, up, expert_offsets, combine, hidden, h, shape)
MOE_FIELDS(FfnDownParams, h, down, expert_offsets, out, shape)
MOE_FIELDS(FfnDownBackwardParams, grad_out, down, hidden, expert_offsets, combine, grad_hidden, h, grad_weights,
           workspace, shape)
MOE_FIELDS(FfnUpBackwardParams, grad_hidden, up, expert_offsets, grad_rows, shape)
MOE_FIELDS(FfnWeightParams, grad, input, expert_offsets, grad_weight, fp32, accumulate, num_rows, outputs, inputs, experts,
           dtype, sm_margin)
#endif

namespace bindings {
namespace {

std::string explain_cuda(int error) {
  const auto code = static_cast<cudaError_t>(error);
  switch (code) {
    case cudaErrorInsufficientDriver:
      return "no NVIDIA driver, or one too old for this build; install or update the driver";
    case cudaErrorNoDevice:
      return "the driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES";
    case cudaErrorNoKernelImageForDevice:
      return "this build has no kernel for the GPU; rebuild with MOE_CUDA_ARCHS set to its architecture";
    default:
      return std::string(cudaGetErrorName(code)) + ", " + cudaGetErrorString(code);
  }
}

struct Cuda {
  // Makes `device` current and restores the previous one.
  class Guard {
   public:
    explicit Guard(int device) {
      // The driver's own functions, as that which encodes tensor maps, need a current context: a thread has none before its
      // first cudaSetDevice, and PyTorch may have made none where all memory comes from its cache.
      static thread_local bool has_context = false;
      if (cudaGetDevice(&before_) != cudaSuccess || (before_ == device && has_context)) return;
      has_context = cudaSetDevice(device) == cudaSuccess;
      changed_ = has_context && before_ != device;
    }
    ~Guard() {
      if (changed_) cudaSetDevice(before_);
    }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    int before_ = 0;
    bool changed_ = false;
  };
  static constexpr auto select_forward = &cuda::select_forward;
  static constexpr auto select_backward = &cuda::select_backward;
  static constexpr auto build_index = &cuda::build_index;
  static constexpr auto index_workspace = &cuda::index_workspace;
  static std::string explain(int error) { return explain_cuda(error); }
};

// (number of devices, "" or why there are none)
py::tuple device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return py::make_tuple(count, "");
  cudaGetLastError();  // the next call must not see this error
  return py::make_tuple(0, explain_cuda(error));
}

}  // namespace
}  // namespace bindings
}  // namespace moe

PYBIND11_MODULE(_cuda, m) {
  using namespace moe;
  using namespace moe::bindings;
  m.doc() = "CUDA kernels of moe_lightning";
  m.def("device_count", &device_count, "() -> (devices, '' or why there are none)");
  define_common<Cuda>(m);
  define<Cuda, cuda::sinkhorn>(m, "sinkhorn");
  m.def("sinkhorn_workspace", cuda::sinkhorn_workspace, py::arg("experts"), "fp32 elements of workspace");
  define<Cuda, cuda::split_bf16>(m, "split_bf16");
  define<Cuda, cuda::sum_parts>(m, "sum_parts");
  define<Cuda, cuda::adamw>(m, "adamw");
  define<Cuda, cuda::permute>(m, "permute");
  define<Cuda, cuda::split_rows>(m, "split_rows");
  define<Cuda, cuda::unpermute>(m, "unpermute");
  define<Cuda, cuda::unpermute_backward>(m, "unpermute_backward");
  define<Cuda, cuda::bucket_slots>(m, "bucket_slots");
  define<Cuda, cuda::send_counts>(m, "send_counts");
  define<Cuda, cuda::recv_offsets>(m, "recv_offsets");
  define<Cuda, cuda::recv_permutation>(m, "recv_permutation");
  m.attr("MAX_RANKS") = kMaxRanks;
  m.attr("FLAG_WORDS") = kFlagWords;
  define<Cuda, cuda::exchange_counts>(m, "exchange_counts");
  define<Cuda, cuda::barrier>(m, "barrier");
  define<Cuda, cuda::dispatch>(m, "dispatch");
  define<Cuda, cuda::combine>(m, "combine");
#ifdef MOE_CUTLASS
  m.attr("CUTLASS") = std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) + "." +
                      std::to_string(CUTLASS_PATCH);
  define<Cuda, cuda::ffn_up>(m, "ffn_up");
  define<Cuda, cuda::ffn_down>(m, "ffn_down");
  define<Cuda, cuda::ffn_down_backward>(m, "ffn_down_backward");
  define<Cuda, cuda::ffn_up_backward>(m, "ffn_up_backward");
  define<Cuda, cuda::ffn_weight_backward>(m, "ffn_weight_backward");
  m.def("ffn_workspace", cuda::ffn_workspace, py::arg("num_rows"), py::arg("hidden_dim"),
        "fp32 elements of workspace of ffn_down_backward");
#else
  m.attr("CUTLASS") = "";  // no expert feed-forward kernels
#endif
}
