// TMA descriptors (sm_90), encoded on the host: five dimensions, boxes of 64 rows (or another number) of 128 bytes, which
// are 64 elements of 16 bits or 32 of fp32, 128-byte swizzle.
#pragma once

#include <cuda.h>

#include "common/launch.cuh"

namespace moe::cuda {

constexpr int kBox = 64;
constexpr int kBoxRowBytes = kBox * 2, kBoxBytes = kBox * kBoxRowBytes;
constexpr int kRaggedSpan = 1 << 30;
constexpr uint64_t kRaggedWrapStride = uint64_t(1) << 34;  // kRaggedSpan * it == 0

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, or null where there is no driver or no device.
inline EncodeTiled tensor_map_encoder() {
  static const EncodeTiled known = [] {
    int devices = 0;
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      cudaGetLastError();
      return EncodeTiled(nullptr);
    }
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      cudaGetLastError();
      return EncodeTiled(nullptr);
    }
    return EncodeTiled(entry);
  }();
  return known;
}

// ok(): whether all descriptors so far could be encoded.
class TensorMaps {
 public:
  explicit TensorMaps(DType dtype)
      : type_(dtype == DType::kFp32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
              : dtype == DType::kFp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                      : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16),
        size_(dtype == DType::kFp32 ? 4 : 2),
        encode_(tensor_map_encoder()) {}

  bool ok() const { return ok_; }

  // Ragged rows (N, parts * width). A box covers 64 columns of one part and up to box_rows rows: for r rows the coordinates
  // are {column, part, kRaggedSpan - r, row + r, kRaggedSpan}. Rows from r on lie outside the third dimension, so loads fill
  // them with zeros and stores skip them, wherever the tensor itself ends. The third and fourth dimensions have the same
  // stride; the last one subtracts kRaggedSpan of them again, by 64 bits that wrap around. (A base address kRaggedSpan rows
  // before the tensor would need no subtraction, but it may not be mapped, and then a load faults that reads nothing of it.)
  CUtensorMap rows(const void* data, int64_t rows, int64_t width, int parts, uint32_t box_rows = kBox) {
    const uint64_t row_bytes = uint64_t(width) * parts * size_;
    static_assert(uint64_t(kRaggedSpan) * kRaggedWrapStride == 0, "an address wraps around");
    return encode(data, {uint64_t(width), uint64_t(parts), kRaggedSpan, uint64_t(rows) + 1, kRaggedSpan + 1},
                  {uint64_t(width) * size_, row_bytes, row_bytes, kRaggedWrapStride - row_bytes},
                  {kBoxRowBytes / size_, 1, box_rows, 1, 1});
  }

  // Weights (E, parts * outputs, inputs). Coordinates are {input, output, part, expert, 0}.
  CUtensorMap weights(const void* data, int experts, int64_t outputs, int64_t inputs, int parts) {
    const uint64_t part_bytes = uint64_t(outputs) * inputs * size_;
    return encode(data, {uint64_t(inputs), uint64_t(outputs), uint64_t(parts), uint64_t(experts), 1},
                  {uint64_t(inputs) * size_, part_bytes, part_bytes * parts, part_bytes * parts},
                  {kBoxRowBytes / size_, kBox, 1, 1, 1});
  }

 private:
  CUtensorMap encode(const void* data, std::initializer_list<uint64_t> sizes, std::initializer_list<uint64_t> strides,
                     std::initializer_list<uint32_t> box) {
    static constexpr uint32_t kElementStrides[5] = {1, 1, 1, 1, 1};
    CUtensorMap map{};
    ok_ = ok_ && encode_ != nullptr &&
          encode_(&map, type_, 5, const_cast<void*>(data), sizes.begin(), strides.begin(), box.begin(), kElementStrides,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
    return map;
  }

  CUtensorMapDataType type_;
  uint32_t size_;  // of an element
  EncodeTiled encode_;
  bool ok_ = true;
};

}  // namespace moe::cuda
