// The module moe_lightning._cuda. It imports without a driver and without a GPU; device_count() then says why nothing can
// run.
#include <cuda_runtime_api.h>

#include "common.h"
#include "permute.h"
#include "sinkhorn.h"
#include "symmetric.h"
#ifdef MOE_CUTLASS
#include <cutlass/version.h>

#include "grouped_ffn.h"
#endif

namespace moe {

Fields fields(const SinkhornParams& p) {
  return concat({MOE_FIELD(logits), MOE_FIELD(scores), MOE_FIELD(workspace), MOE_FIELD(tokens), MOE_FIELD(experts),
                 MOE_FIELD(dtype), MOE_FIELD(iterations), MOE_FIELD(temperature), MOE_FIELD(tolerance),
                 MOE_FIELD(row_stride)});
}

// ---- movement of rows ----------------------------------------------------------------------------------------------

Fields fields(const RowShape& p) {
  return concat({MOE_FIELD(tokens), MOE_FIELD(width), MOE_FIELD(top_k), MOE_FIELD(dtype)});
}

Fields fields(const PermuteParams& p) {
  return concat({MOE_FIELD(x), MOE_FIELD(second_x), MOE_FIELD(first_tokens), MOE_FIELD(inverse_perm), MOE_FIELD(rows),
                 MOE_FIELD(shape)});
}

Fields fields(const SplitRowsParams& p) {
  return concat({MOE_FIELD(rows), MOE_FIELD(inverse_perm), MOE_FIELD(first), MOE_FIELD(second), MOE_FIELD(first_rows),
                 MOE_FIELD(shape)});
}

Fields fields(const UnpermuteParams& p) {
  return concat({MOE_FIELD(rows), MOE_FIELD(weights), MOE_FIELD(inverse_perm), MOE_FIELD(kept_rows), MOE_FIELD(y),
                 MOE_FIELD(shape)});
}

Fields fields(const UnpermuteBackwardParams& p) {
  return concat({MOE_FIELD(grad_y), MOE_FIELD(rows), MOE_FIELD(weights), MOE_FIELD(inverse_perm), MOE_FIELD(kept_rows),
                 MOE_FIELD(grad_rows), MOE_FIELD(grad_weights), MOE_FIELD(shape)});
}

// ---- between ranks -------------------------------------------------------------------------------------------------

Fields fields(const EpLayout& p) {
  return concat({MOE_FIELD(rank), MOE_FIELD(ranks), MOE_FIELD(chunks), MOE_FIELD(local_experts), MOE_FIELD(groups)});
}

Fields fields(const BucketSlotsParams& p) {
  return concat({MOE_FIELD(expert_ids), MOE_FIELD(buckets), MOE_FIELD(slots), MOE_FIELD(chunk_slots), MOE_FIELD(layout)});
}

Fields fields(const SendCountsParams& p) {
  return concat({MOE_FIELD(bucket_offsets), MOE_FIELD(send_counts), MOE_FIELD(layout)});
}

Fields fields(const RecvOffsetsParams& p) {
  return concat({MOE_FIELD(send_counts), MOE_FIELD(recv_counts), MOE_FIELD(totals), MOE_FIELD(offsets), MOE_FIELD(layout)});
}

Fields fields(const RecvPermutationParams& p) {
  return concat({MOE_FIELD(recv_counts), MOE_FIELD(perm), MOE_FIELD(layout)});
}

Fields fields(const Signals& p) {
  return concat({MOE_FIELD(flags), MOE_FIELD(state), MOE_FIELD(error), MOE_FIELD(timeout_ns), MOE_FIELD(rank),
                 MOE_FIELD(ranks)});
}

Fields fields(const Route& p) {
  return concat({MOE_FIELD(expert_ids), MOE_FIELD(inverse_perm), MOE_FIELD(dst_offset), MOE_FIELD(experts),
                 MOE_FIELD(local_experts)});
}

Fields fields(const ExchangeCountsParams& p) {
  return concat({MOE_FIELD(signals), MOE_FIELD(steps), MOE_FIELD(own_offsets), MOE_FIELD(counts), MOE_FIELD(expert_offsets),
                 MOE_FIELD(dst_offset), MOE_FIELD(capacity), MOE_FIELD(buffer), MOE_FIELD(experts)});
}

Fields fields(const BarrierParams& p) { return concat({MOE_FIELD(signals), MOE_FIELD(steps)}); }

Fields fields(const DispatchParams& p) {
  return concat({MOE_FIELD(signals), MOE_FIELD(steps), MOE_FIELD(route), MOE_FIELD(x), MOE_FIELD(weights), MOE_FIELD(rows),
                 MOE_FIELD(row_weights), MOE_FIELD(shape)});
}

Fields fields(const CombineParams& p) {
  return concat({MOE_FIELD(route), MOE_FIELD(rows), MOE_FIELD(row_scalars), MOE_FIELD(y), MOE_FIELD(scalars),
                 MOE_FIELD(shape)});
}

// ---- the experts' feed-forward network -----------------------------------------------------------------------------

#ifdef MOE_CUTLASS
Fields fields(const FfnShape& p) {
  return concat({MOE_FIELD(num_rows), MOE_FIELD(d_model), MOE_FIELD(hidden_dim), MOE_FIELD(experts), MOE_FIELD(activation),
                 MOE_FIELD(dtype), MOE_FIELD(sm_margin)});
}

Fields fields(const RowWeights& p) { return concat({MOE_FIELD(weights), MOE_FIELD(slot_of_row)}); }

Fields fields(const FfnUpParams& p) {
  return concat({MOE_FIELD(rows), MOE_FIELD(up), MOE_FIELD(expert_offsets), MOE_FIELD(combine), MOE_FIELD(hidden),
                 MOE_FIELD(h), MOE_FIELD(shape)});
}

Fields fields(const FfnDownParams& p) {
  return concat({MOE_FIELD(h), MOE_FIELD(down), MOE_FIELD(expert_offsets), MOE_FIELD(out), MOE_FIELD(shape)});
}

Fields fields(const FfnDownBackwardParams& p) {
  return concat({MOE_FIELD(grad_out), MOE_FIELD(down), MOE_FIELD(hidden), MOE_FIELD(expert_offsets), MOE_FIELD(combine),
                 MOE_FIELD(grad_hidden), MOE_FIELD(h), MOE_FIELD(grad_weights), MOE_FIELD(workspace), MOE_FIELD(shape)});
}

Fields fields(const FfnUpBackwardParams& p) {
  return concat({MOE_FIELD(grad_hidden), MOE_FIELD(up), MOE_FIELD(expert_offsets), MOE_FIELD(grad_rows), MOE_FIELD(shape)});
}

Fields fields(const FfnWeightParams& p) {
  return concat({MOE_FIELD(grad), MOE_FIELD(input), MOE_FIELD(expert_offsets), MOE_FIELD(grad_weight), MOE_FIELD(num_rows),
                 MOE_FIELD(outputs), MOE_FIELD(inputs), MOE_FIELD(experts), MOE_FIELD(dtype), MOE_FIELD(sm_margin)});
}
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
      if (cudaGetDevice(&before_) != cudaSuccess || before_ == device) return;
      changed_ = cudaSetDevice(device) == cudaSuccess;
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
