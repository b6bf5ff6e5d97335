// mma.sync (sm_80 and newer) and its operands: cp.async of 16 bytes per thread into swizzled shared memory, ldmatrix from
// there into registers.
#pragma once

#include <type_traits>

#include "common/launch.cuh"

namespace moe::cuda::sm80 {

// The contraction (K) runs along the rows of an operand in memory, or across them (MN).
enum class Major { kK, kMN };

constexpr int kTileK = 32;             // K of a stage
constexpr int kStep = 16;              // K of one instruction
constexpr int kSteps = kTileK / kStep;
constexpr int kWarpTile = 64;          // a warp's part of a tile is 64 x 64
constexpr int kBoxBytes = kTileK * kWarpTile * 2;

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {  // all but the last kPending groups of this thread
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// 16 bytes, or as many zeros.
__device__ __forceinline__ void copy_or_clear(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}

// acc (16 x 8, fp32) += a (16 x 16) b (16 x 8)
template <class Format>
__device__ __forceinline__ void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t* b) {
  if constexpr (std::is_same_v<Format, Bf16>) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// A stage of an operand is boxes of 64 along M or N, of 4 KB each: K-major 64 rows of 64 bytes, MN-major 32 rows of
// 128 bytes. Vectors of 16 bytes are swizzled, so that the same vector of eight rows lies in eight different banks.
template <Major kMajor>
struct Layout {
  static constexpr int kVectors = kMajor == Major::kK ? kTileK / 8 : kWarpTile / 8, kRowBytes = kVectors * 16;

  static __device__ __forceinline__ uint32_t address(int row, int vector) {
    return row * kRowBytes + ((vector ^ row / (8 / kVectors) % kVectors) << 4);
  }
};

// A tile's operand in global memory, from its own first element on. Elements outside read as zeros.
struct Source {
  const uint16_t* data;
  int mn, k;        // extents inside
  int stride;       // elements from one row to the next
  int64_t to_part;  // elements from the gates to their ups
};

// Copies stage after stage of an operand of kExtent along M or N. Of a gated one, which is K-major, every 64 rows of
// shared memory are 32 gates and their 32 ups.
template <Major kMajor, int kExtent, int kThreads, bool kGated>
class Loader {
 public:
  __device__ __forceinline__ void start(const Source& source) {
    const int row = threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
    const int part = kGated && kRows > 32 ? row / 32 : 0;
    const int mn = kK ? row - part * 32 : vector * 8, k = kK ? vector * 8 : row;
    next_ = source.data + int64_t(row - part * 32) * source.stride + vector * 8 + part * source.to_part;
    mn_left_ = source.mn - mn;
    k_left_ = source.k - k;
    stride_ = source.stride;
    to_part_ = source.to_part;
  }

  // The next stage, to shared memory from `to` on. `valid` is any valid address, used where nothing is read.
  __device__ __forceinline__ void copy(uint32_t to, const uint16_t* valid) {
    to += Layout<kMajor>::address(threadIdx.x / kVectors, threadIdx.x % kVectors);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool inside = mn_of(i) < mn_left_ && k_of(i) < k_left_;
      const uint16_t* const from = next_ + int64_t(kK ? mn_of(i) : k_of(i)) * stride_ + (kK ? 0 : mn_of(i)) +
                                   (part_of(i) == 0 ? 0 : to_part_);
      copy_or_clear(to + i * kRows * Layout<kMajor>::kRowBytes, inside ? from : valid, inside);
    }
    next_ += kK ? kTileK : int64_t(kTileK) * stride_;
    k_left_ -= kTileK;
  }

 private:
  static constexpr bool kK = kMajor == Major::kK;
  static constexpr int kVectors = Layout<kMajor>::kVectors;
  static constexpr int kRows = kThreads / kVectors;  // that all threads copy at once
  static constexpr int kCopies = kExtent * kTileK / 8 / kThreads;
  static_assert(!kGated || (kK && (kRows == 32 || kRows == 64)), "a gated operand is K-major");
  static_assert(kK || kTileK % kRows == 0, "threads stay in a box");

  // Where a thread's i-th copy lies, from its first one.
  static constexpr int part_of(int i) { return kGated && kRows == 32 ? i % 2 : 0; }
  static constexpr int mn_of(int i) {
    if (kGated) return kRows == 32 ? i / 2 * 32 : i * 32;
    return kK ? i * kRows : i * kRows / kTileK * kWarpTile;
  }
  static constexpr int k_of(int i) { return kK ? 0 : i * kRows % kTileK; }

  const uint16_t* next_;
  int mn_left_, k_left_, stride_;
  int64_t to_part_;
};

// A warp's 64 x 16 of an operand, as the instruction wants it: words of four matrices for every 16 along M or N.
template <Major kMajor, bool kIsA>
class Fragments {
 public:
  __device__ __forceinline__ explicit Fragments(int box) {
    const int lane = threadIdx.x % kWarp, row = lane % 8, matrix = lane / 8;
    const int mn = kIsA ? matrix % 2 : matrix / 2, k = kIsA ? matrix / 2 : matrix % 2;
    first_ = box * kBoxBytes + (kMajor == Major::kK ? Layout<kMajor>::address(mn * 8 + row, k)
                                                    : Layout<kMajor>::address(k * 8 + row, mn));
  }

  // Step `step` of the stage from `stage` on. The swizzle lets an exclusive or take steps of 16 elements.
  __device__ __forceinline__ void load(uint32_t stage, int step, uint32_t (&words)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int vectors = 2 * (kMajor == Major::kK ? step : i), rows = 16 * (kMajor == Major::kK ? i : step);
      const uint32_t address = stage + (first_ ^ vectors << 4) + rows * Layout<kMajor>::kRowBytes;
      if constexpr (kMajor == Major::kK) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[i][0]), "=r"(words[i][1]), "=r"(words[i][2]), "=r"(words[i][3])
                     : "r"(address)
                     : "memory");
      } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[i][0]), "=r"(words[i][1]), "=r"(words[i][2]), "=r"(words[i][3])
                     : "r"(address)
                     : "memory");
      }
    }
  }

 private:
  uint32_t first_;
};

}  // namespace moe::cuda::sm80
