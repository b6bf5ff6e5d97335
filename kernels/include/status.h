// What a launcher answers. Launchers never throw, print, allocate or synchronise.
#pragma once

#include <cstdint>

namespace moe {

using Stream = void*;  // a cudaStream_t; ignored by the CPU kernels

enum class Code { kOk, kDtype, kExperts, kTopK, kScore, kGroups, kGaps, kTokens, kSlots, kWidth, kIterations, kFp64,
                  kDtype16, kAligned, kActivation, kArchitecture, kTensorMap, kSmMargin, kAccumulate, kRanks, kLayout,
                  kParts, kElements, kCuda };

struct Status {
  Code code = Code::kOk;
  int cuda_error = 0;  // a cudaError_t when code is kCuda

  bool ok() const { return code == Code::kOk; }
};

// The rule that was broken, for the text of an exception.
inline const char* rule(Code code) {
  switch (code) {
    case Code::kOk: return "ok";
    case Code::kDtype: return "dtype must be one of fp64, fp32, fp16, bf16";
    case Code::kExperts: return "num_experts must be in [1, 1024]";
    case Code::kTopK: return "top_k must be in [1, min(num_experts, 32)]";
    case Code::kScore: return "score must be softmax, sigmoid or sqrtsoftplus";
    case Code::kGroups: return "n_group must be in [1, 32] and divide the experts, topk_group of them hold top_k experts";
    case Code::kGaps: return "gaps need an expert that is not selected, and no groups";
    case Code::kTokens: return "the number of tokens must be below 2**31";
    case Code::kSlots: return "the number of slots must be below 2**31";
    case Code::kWidth: return "the width of a row must not be negative";
    case Code::kIterations: return "iterations must be at least 1";
    case Code::kFp64: return "dtype must be one of fp32, fp16, bf16";
    case Code::kDtype16: return "dtype must be one of fp16, bf16";
    case Code::kAligned: return "d_model and hidden_dim must be positive multiples of 8";
    case Code::kActivation: return "activation must be swiglu or gelu";
    case Code::kArchitecture: return "the device must be of compute capability 8.0 or newer, and the build for it";
    case Code::kTensorMap: return "the driver refused a tensor map";
    case Code::kSmMargin: return "sm_margin must not be negative";
    case Code::kAccumulate: return "only gradients in fp32 can be added to others";
    case Code::kRanks: return "ranks must be in [1, 64] and share the experts evenly, and rank be one of them";
    case Code::kLayout: return "rank must be below ranks, ranks * local_experts at most 1024, and chunks hold all slots";
    case Code::kParts: return "a number is split into 1 to 4 parts";
    case Code::kElements: return "64 tensors must have fewer than 2**44 elements";
    case Code::kCuda: return "the CUDA runtime refused the launch";
  }
  return "unknown status";
}

}  // namespace moe
