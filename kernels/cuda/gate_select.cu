// Experiment: the gate's matrix product and the selection in one kernel (sm_90a, fp16, 64 experts, top-2).
// 128 blocks of 32 tokens; logits^T = weight x^T on wgmma m64n32k16 with the experts as rows, 16 stages of 64 deep
// tiles by TMA, the weight's halves multicast over a pair of blocks; then a row's logits go through shared memory to
// the lanes that rank it.
#include "gate_select.h"
#include <cuda.h>
#include <algorithm>
#include "select_kernel.cuh"
namespace moe::cuda {
namespace {
constexpr int kTokens = 32, kDepth = 64, kStages = 16, kExperts = 64;
constexpr int kConsumers = 128, kThreads = kConsumers + kWarp;
constexpr int kWeightBytes = kExperts * kDepth * 2, kTokenBytes = kTokens * kDepth * 2;
constexpr int kStageBytes = kWeightBytes + kTokenBytes;
constexpr int kPitch = kExperts + 8;
struct GateLaunch { SelectLaunch select; int steps; };
TallyRows tally_rows;

__device__ __forceinline__ uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  }
}
__device__ __forceinline__ uint64_t descriptor(uint32_t at) {
  return uint64_t((at & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
__device__ __forceinline__ void mma(float (&d)[16], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
      "%14, %15}, %16, %17, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "l"(a), "l"(b));
}

template <int kMaxK>
__global__ void __launch_bounds__(kThreads) gate_select_kernel(const GateLaunch p, const __grid_constant__ CUtensorMap xs,
                                                               const __grid_constant__ CUtensorMap ws) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ __align__(8) unsigned long long full[kStages], empty[kStages];
  __shared__ __align__(16) int16_t logits[kTokens * kPitch];
  __shared__ int32_t counts[kExperts];
  __shared__ int32_t invalid;
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp;
  const uint32_t stages = (address(shared) + 1023) & ~1023u;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&full[s])) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 8;" ::"r"(address(&empty[s])) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  clear_block_counts(p.select, counts, &invalid);
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  let_next_start();
  wait_for_previous();
  if (warp == 4) {
    if (lane == 0) {
      const int token = blockIdx.x * kTokens;
      for (int k = 0; k < p.steps; ++k) {
        const int s = k % kStages;
        if (k >= kStages) wait(address(&empty[s]), (k / kStages - 1) & 1);
        const uint32_t barrier = address(&full[s]), at = stages + s * kStageBytes;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(kStageBytes) : "memory");
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                at + kWeightBytes), "l"(&xs), "r"(k * kDepth), "r"(token), "r"(barrier) : "memory");
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
            "{%2, %3}], [%4], %5;" ::"r"(at + rank * (kWeightBytes / 2)), "l"(&ws), "r"(k * kDepth), "r"(int(rank) * 32),
            "r"(barrier), "h"(uint16_t(3)) : "memory");
      }
    }
  } else {
    float sums[16] = {};
    const auto release = [&](int k) {
      if (lane >= 2) return;
      uint32_t there;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(&empty[k % kStages])), "r"(lane));
      asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
    };
    constexpr int kGroup = 4;
    for (int k = 0; k < p.steps; k += kGroup) {
      const int first = k % kStages;
#pragma unroll
      for (int g = 0; g < kGroup; ++g) wait(address(&full[first + g]), k / kStages & 1);
#pragma unroll
      for (int i = 0; i < 16; ++i) asm volatile("" : "+f"(sums[i]) :: "memory");
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const uint32_t at = stages + (first + g) * kStageBytes;
#pragma unroll
        for (int i = 0; i < kDepth / 16; ++i) mma(sums, descriptor(at + i * 32), descriptor(at + kWeightBytes + i * 32));
      }
      asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < 16; ++i) asm volatile("" : "+f"(sums[i]) :: "memory");
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        if (k + kStages < p.steps) release(k + g);
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("" : "+f"(sums[i]));
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, expert = warp * 16 + lane / 4 + i % 4 / 2 * 8;
      logits[token * kPitch + expert] = Fp16::from_real(sums[i]);
    }
    asm volatile("bar.sync 1, 128;" ::: "memory");
    const Chooser<Fp16, 4, 16, kMaxK, true, false> chooser(p.select, counts, &invalid);
    Row<Fp16, 4, 16, false> row;
    const int local = threadIdx.x / 4, t = blockIdx.x * kTokens + local;
    const bool active = t < p.select.tokens;
    using Chunk = typename Row<Fp16, 4, 16, false>::Chunk;
    int16_t* const out = static_cast<int16_t*>(const_cast<void*>(p.select.logits)) + int64_t(t) * kExperts;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      row.chunks[c] = *reinterpret_cast<const Chunk*>(logits + local * kPitch + chooser.layout.first_id(c));
      if (active) *reinterpret_cast<Chunk*>(out + chooser.layout.first_id(c)) = row.chunks[c];
    }
    chooser.choose(row, t, active);
  }
  __syncthreads();
  add_block_counts(p.select, counts, invalid);
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

bool encode(CUtensorMap* map, const void* at, int64_t rows, int64_t width) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                              const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static Encode encode_tiled = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<Encode>(found);
  }();
  if (encode_tiled == nullptr) return false;
  const cuuint64_t sizes[2] = {cuuint64_t(width), cuuint64_t(rows)}, strides[1] = {cuuint64_t(width) * 2};
  const cuuint32_t box[2] = {kDepth, 32}, steps[2] = {1, 1};
  return encode_tiled(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(at), sizes, strides, box, steps,
                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
}  // namespace

Status gate_select(const GateSelectParams& params, Stream stream) {
  if (params.select.experts != kExperts || params.select.top_k != 2 || params.d_model % kDepth) return {Code::kExperts};
  GateLaunch p{{params.select, tally_rows.row_of(native(stream)), true}, int(params.d_model / kDepth)};
  p.select.logits = params.logits;
  CUtensorMap xs, ws;
  if (!encode(&xs, params.x, params.select.tokens, params.d_model) || !encode(&ws, params.weight, kExperts, params.d_model)) return {Code::kDtype};
  const int blocks = int(ceil_div<int64_t>(params.select.tokens, 2 * kTokens)) * 2;
  const auto kernel = gate_select_kernel<2>;
  constexpr int kShared = kStages * kStageBytes + 1024;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  cudaLaunchAttribute attributes[2] = {};
  set_cluster(attributes[0], 2);
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = native(stream);
  config.attrs = attributes;
  config.numAttrs = 2;
  cudaLaunchKernelEx(&config, kernel, p, xs, ws);
  return launched();
}
}  // namespace moe::cuda
