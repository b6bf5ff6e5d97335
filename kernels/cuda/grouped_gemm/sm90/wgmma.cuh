// WGMMA of a warpgroup (sm_90a): 64 x 256 accumulators in fp32 += 64 x 64 of A times 64 x 256 of B, both in shared memory
// as boxes of 64 x 64, swizzled over 128 bytes.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "dtype.h"
#include "grouped_gemm/sm90/tma.cuh"

namespace moe::cuda {

constexpr int kAccRegs = 128;  // per thread

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

// N of an instruction: 256 reads A least often, and needs more than 128 registers per thread when the kernel starts.
template <class Format, Major kMajorA, Major kMajorB, int kAtomN>
struct WgmmaOf;
template <Major kMajorA, Major kMajorB>
struct WgmmaOf<Bf16, kMajorA, kMajorB, 256> : cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<kMajorA, kMajorB> {};
template <Major kMajorA, Major kMajorB>
struct WgmmaOf<Fp16, kMajorA, kMajorB, 256> : cute::SM90::GMMA::MMA_64x256x16_F32F16F16_SS<kMajorA, kMajorB> {};
template <Major kMajorA, Major kMajorB>
struct WgmmaOf<Bf16, kMajorA, kMajorB, 128> : cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<kMajorA, kMajorB> {};
template <Major kMajorA, Major kMajorB>
struct WgmmaOf<Fp16, kMajorA, kMajorB, 128> : cute::SM90::GMMA::MMA_64x128x16_F32F16F16_SS<kMajorA, kMajorB> {};

// An operand in shared memory. K runs along a box's 128-byte rows (K-major), or across them (MN-major).
template <Major kMajor>
struct Operand {
  // 16 bytes are the unit of a descriptor. Eight rows are 1024 bytes; boxes that follow one another are 64 rows more,
  // which is the same stride for K-major operands, and given for MN-major ones.
  static constexpr uint64_t kUnit = 16, kSwizzle128 = uint64_t(1) << 62;
  static constexpr uint64_t kEightRows = uint64_t(1024 / kUnit) << 32;
  static constexpr uint64_t kNextBox = uint64_t(kMajor == Major::MN ? kBoxBytes / kUnit : 1) << 16;
  // One K atom: 32 bytes along a row, or 16 rows.
  static constexpr uint64_t kAtomStride = (kMajor == Major::MN ? 16 * 128 : 32) / kUnit;

  // In a cluster, an address of shared memory has the block's rank above its 18 bits: that must not reach kNextBox.
  static __device__ __forceinline__ uint64_t descriptor(const void* box) {
    const auto address = uint32_t(__cvta_generic_to_shared(box)) & 0x3ffff;
    return kSwizzle128 | kEightRows | kNextBox | (address / kUnit);
  }
};

template <class Mma, int kFirst, size_t... kIndex>
__device__ __forceinline__ void wgmma_fma(uint64_t a, uint64_t b, float (&acc)[kAccRegs], ScaleOut scale,
                                              std::index_sequence<kIndex...>) {
  Mma::fma(a, b, acc[kFirst + kIndex]..., scale);
}

constexpr int kKAtoms = kBox / 16;  // per K tile, 16 elements each

// Issues the WGMMAs of one K tile, or of its first kCount atoms, and commits them as one group. `zero_init` clears the
// accumulators first.
template <class Format, Major kMajorA, Major kMajorB, int kAtomN, int kCount = kKAtoms>
__device__ __forceinline__ void wgmma_async(uint64_t a, uint64_t b, float (&acc)[kAccRegs], bool zero_init) {
  constexpr uint64_t kBoxUnits = kBoxBytes / Operand<kMajorB>::kUnit;
  using Mma = WgmmaOf<Format, kMajorA, kMajorB, kAtomN>;
#pragma unroll
  for (float& value : acc) cute::warpgroup_fence_operand(value);
  cute::warpgroup_arrive();
#pragma unroll
  for (int atom = 0; atom < kCount; ++atom) {
    const auto scale = zero_init && atom == 0 ? ScaleOut::Zero : ScaleOut::One;
    const uint64_t a_atom = a + atom * Operand<kMajorA>::kAtomStride, b_atom = b + atom * Operand<kMajorB>::kAtomStride;
    wgmma_fma<Mma, 0>(a_atom, b_atom, acc, scale, std::make_index_sequence<kAtomN / 2>());
    if constexpr (kAtomN == 128) {
      wgmma_fma<Mma, kAccRegs / 2>(a_atom, b_atom + 2 * kBoxUnits, acc, scale,
                                    std::make_index_sequence<kAtomN / 2>());
    }
  }
  cute::warpgroup_commit_batch();
#pragma unroll
  for (float& value : acc) cute::warpgroup_fence_operand(value);
}

}  // namespace moe::cuda
