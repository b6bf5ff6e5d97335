// AdamW: 28 bytes of memory traffic per weight, the least there is, and nothing else.
#include "adamw.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <iterator>

#include "common/launch.cuh"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;
constexpr int kAtOnce = 2;   // vectors of each array in flight per thread
constexpr int kRounds = 4;
constexpr int64_t kChunk = kThreads * kVector * kAtOnce * kRounds;  // elements of a block
constexpr int kMostTensors = 64;                                    // of a launch, whose arguments are 4 KiB at the most

struct AdamWLaunch {
  AdamWTensor tensors[kMostTensors];
  int first_block[kMostTensors];  // ascending; those that are not there have the highest int
  const float* gradient_scale;
  double beta1, beta2, learning_rate;
  float mean_decay, mean_gain, square_decay, square_gain, epsilon, weight_decay;
};
static_assert(sizeof(AdamWLaunch) <= 4096);

struct Update {
  const AdamWLaunch& p;
  float scale, step_size, correction;

  __device__ void operator()(float& weight, float gradient, float& mean, float& square) const {
    gradient *= scale;
    weight -= p.weight_decay * weight;
    mean = p.mean_decay * mean + p.mean_gain * gradient;
    square = p.square_decay * square + p.square_gain * gradient * gradient;
    weight -= step_size * mean / (sqrtf(square) / correction + p.epsilon);
  }
};

__device__ float4 load(const float* from, int64_t vector) { return __ldcs(reinterpret_cast<const float4*>(from) + vector); }

__device__ void store(float* to, int64_t vector, float4 value) { __stcs(reinterpret_cast<float4*>(to) + vector, value); }

__device__ bool is_aligned(const AdamWTensor& t) {
  return (reinterpret_cast<uintptr_t>(t.weight) | reinterpret_cast<uintptr_t>(t.gradient) |
          reinterpret_cast<uintptr_t>(t.mean) | reinterpret_cast<uintptr_t>(t.square)) % sizeof(float4) == 0;
}

__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ AdamWLaunch p) {
  __shared__ float corrections[2];
  int index = 0;
#pragma unroll
  for (int step = kMostTensors / 2; step > 0; step /= 2) {
    if (p.first_block[index + step] <= int(blockIdx.x)) index += step;
  }
  const AdamWTensor& t = p.tensors[index];
  if (threadIdx.x == 0) {
    const double step = *t.step;
    corrections[0] = float(p.learning_rate / (1 - pow(p.beta1, step)));
    corrections[1] = float(sqrt(1 - pow(p.beta2, step)));
  }
  __syncthreads();
  const float scale = p.gradient_scale == nullptr ? 1.0f : *p.gradient_scale;
  const Update update{p, scale, corrections[0], corrections[1]};
  const int64_t begin = int64_t(int(blockIdx.x) - p.first_block[index]) * kChunk, end = min(begin + kChunk, t.count);
  const int64_t vectors_end = is_aligned(t) ? end / kVector : begin / kVector;
#pragma unroll 1
  for (int64_t v = begin / kVector + threadIdx.x; v < vectors_end; v += kAtOnce * kThreads) {
    float4 weight[kAtOnce], gradient[kAtOnce], mean[kAtOnce], square[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t at = v + u * kThreads;
      if (at >= vectors_end) break;
      weight[u] = load(t.weight, at);
      gradient[u] = load(t.gradient, at);
      mean[u] = load(t.mean, at);
      square[u] = load(t.square, at);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t at = v + u * kThreads;
      if (at >= vectors_end) break;
      update(weight[u].x, gradient[u].x, mean[u].x, square[u].x);
      update(weight[u].y, gradient[u].y, mean[u].y, square[u].y);
      update(weight[u].z, gradient[u].z, mean[u].z, square[u].z);
      update(weight[u].w, gradient[u].w, mean[u].w, square[u].w);
      store(t.weight, at, weight[u]);
      store(t.mean, at, mean[u]);
      store(t.square, at, square[u]);
    }
  }
  for (int64_t i = vectors_end * kVector + threadIdx.x; i < end; i += kThreads) {
    update(t.weight[i], t.gradient[i], t.mean[i], t.square[i]);
  }
}

}  // namespace

Status adamw(const AdamWParams& p, Stream stream) {
  const auto* next = static_cast<const AdamWTensor*>(p.tensors);
  const auto* const end = next + std::max<int64_t>(p.size, 0);
  while (next != end) {
    AdamWLaunch launch{};
    launch.gradient_scale = static_cast<const float*>(p.gradient_scale);
    launch.beta1 = p.beta1;
    launch.beta2 = p.beta2;
    launch.learning_rate = p.learning_rate;
    launch.mean_decay = float(p.beta1);
    launch.mean_gain = float(1 - p.beta1);
    launch.square_decay = float(p.beta2);
    launch.square_gain = float(1 - p.beta2);
    launch.epsilon = float(p.epsilon);
    launch.weight_decay = float(p.learning_rate * p.weight_decay);
    std::fill(std::begin(launch.first_block), std::end(launch.first_block), INT_MAX);
    int64_t blocks = 0;
    for (int i = 0; i < kMostTensors && next != end; ++next) {
      if (next->count <= 0) continue;
      launch.tensors[i] = *next;
      launch.first_block[i++] = int(blocks);
      blocks += ceil_div(next->count, kChunk);
      if (blocks >= INT_MAX) return {Code::kElements};
    }
    if (blocks == 0) break;
    Launch(unsigned(blocks), kThreads, 0, stream).run(adamw_kernel, launch);
    if (const Status status = last_error(); !status.ok()) return status;
  }
  return {};
}

}  // namespace moe::cuda
