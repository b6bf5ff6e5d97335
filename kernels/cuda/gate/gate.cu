// fp32 numbers as sums of bf16 ones, and back: one pass each, where torch takes some ten.
#include "gate.h"

#include <algorithm>

#include "common/launch.cuh"
#include "dtype.h"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;
constexpr int kPieces = 3;

template <int kWidth>
struct alignas(4 * kWidth) Floats {
  float at[kWidth];
};

template <int kWidth>
struct alignas(2 * kWidth) Bf16s {
  Bf16::Bits at[kWidth];
};

template <int kWidth>
__global__ void __launch_bounds__(kThreads) split_bf16_kernel(const SplitBf16Params p) {
  launch_dependent_grids();
  wait_on_dependent_grids();
  const int64_t vectors = p.cols / kWidth, total = p.rows * vectors, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t row = i / vectors, col = (i - row * vectors) * kWidth;
    const auto value = static_cast<const Floats<kWidth>*>(p.value)[i];
    Bf16s<kWidth> pieces[kPieces];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      float rest = value.at[j];
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        pieces[piece].at[j] = Bf16::from_real(rest);
        rest -= Bf16::to_real(pieces[piece].at[j]);
      }
    }
    Bf16::Bits* to = static_cast<Bf16::Bits*>(p.parts) + row * p.row_stride + col;
    for (int part = 0; part < p.count; ++part, to += p.part_stride) {
      const int piece = p.order >> 2 * part & 3;
      *reinterpret_cast<Bf16s<kWidth>*>(to) = piece == 0 ? pieces[0] : piece == 1 ? pieces[1] : pieces[2];
    }
  }
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(const SumPartsParams p) {
  launch_dependent_grids();
  wait_on_dependent_grids();
  const int64_t vectors = p.cols / kWidth, total = p.rows * vectors, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t row = i / vectors, col = (i - row * vectors) * kWidth;
    const float* from = static_cast<const float*>(p.parts) + row * p.row_stride + col;
    Floats<kWidth> parts[kPieces];
#pragma unroll
    for (int part = 0; part < kPieces; ++part, from += p.part_stride) {
      parts[part] = *reinterpret_cast<const Floats<kWidth>*>(from);
    }
    Floats<kWidth> sum;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum.at[j] = parts[0].at[j] + parts[1].at[j] + parts[2].at[j];
    static_cast<Floats<kWidth>*>(p.sum)[i] = sum;
  }
}

// Launches kernel_for(elements per vector): four where all rows and parts begin at a vector.
template <class Params, class KernelFor>
Status launch(const Params& p, std::initializer_list<const void*> moved, Stream stream, const KernelFor& kernel_for) {
  if (p.rows < 0 || p.cols < 0) return {Code::kWidth};
  if (p.rows == 0 || p.cols == 0) return {};
  constexpr int kWide = 4;
  const bool wide = (p.cols | p.part_stride | p.row_stride) % kWide == 0 &&
                    std::all_of(moved.begin(), moved.end(), [](const void* at) {
                      return reinterpret_cast<uintptr_t>(at) % 16 == 0;
                    });
  const auto with = [&](auto width) {
    const int64_t blocks = ceil_div<int64_t>(p.rows * p.cols / width, kThreads);
    launch_pdl(kernel_for(width), unsigned(std::min(blocks, kMaxBlocks)), kThreads, 0, stream, p);
  };
  if (wide) with(std::integral_constant<int, kWide>{});
  else with(std::integral_constant<int, 1>{});
  return last_error();
}

}  // namespace

Status split_bf16(const SplitBf16Params& p, Stream stream) {
  if (p.count < 1 || p.count > 4) return {Code::kParts};
  return launch(p, {p.value, p.parts}, stream, [](auto width) { return split_bf16_kernel<decltype(width)::value>; });
}

Status sum_parts(const SumPartsParams& p, Stream stream) {
  return launch(p, {p.parts, p.sum}, stream, [](auto width) { return sum_parts_kernel<decltype(width)::value>; });
}

}  // namespace moe::cuda
