// What stands around the products of the gate: an fp32 factor as bf16 parts that matrix units take, and the sum of the
// parts of a product.
#pragma once

#include <cstdint>

#include "status.h"

namespace moe {

// part p of row r, parts + p part_stride + r row_stride, is bf16 piece `order >> 2p & 3` of value row r. The pieces of a
// number are its rounding, that of what remains, and again: eight bits of it each, largest first.
struct SplitBf16Params {
  const void* value;  // fp32 (rows, cols), contiguous
  void* parts;        // bf16
  int64_t rows;
  int64_t cols;
  int64_t part_stride;
  int64_t row_stride;
  int32_t count;  // of parts, 1 to 4
  int32_t order;
};

struct SumPartsParams {  // sum[r, c] = parts[r row_stride + c] + the same, part_stride and twice that on, in this order
  const void* parts;     // fp32
  void* sum;             // fp32 (rows, cols), contiguous
  int64_t rows;
  int64_t cols;
  int64_t part_stride;
  int64_t row_stride;
};

namespace cuda {
Status split_bf16(const SplitBf16Params& params, Stream stream);
Status sum_parts(const SumPartsParams& params, Stream stream);
}  // namespace cuda

}  // namespace moe
