// The update of AdamW (arXiv:1711.05101), many tensors per launch, each read and written once. An MoE has several times
// the weights that a token uses, so its update is a part of the step like its products.
#pragma once

#include <cstdint>

#include "status.h"

namespace moe {

// fp32 tensors of `count` elements, contiguous. Filled in from rows of six int64.
struct AdamWTensor {
  float* weight;
  const float* gradient;
  float* mean;         // first moment
  float* square;       // second moment
  const float* step;   // scalar: which update this is, from 1 on
  int64_t count;
};
static_assert(sizeof(AdamWTensor) == 6 * sizeof(int64_t));

struct AdamWParams {
  const void* tensors;            // AdamWTensor (size), in host memory, read before the launcher returns
  const void* gradient_scale;     // fp32 scalar that multiplies the gradients, or null
  int64_t size;
  double learning_rate;
  double beta1;
  double beta2;
  double epsilon;
  double weight_decay;
};

namespace cuda {
Status adamw(const AdamWParams& params, Stream stream);
}  // namespace cuda

}  // namespace moe
