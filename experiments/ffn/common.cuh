#pragma once
#include <unistd.h>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>
#include "ffn_sm90_down_backward.cuh"
#include "permute.h"

using namespace moe;
using namespace moe::cuda;
using u16 = uint16_t;

#define CK(x) do { cudaError_t e_ = (x); if (e_ != cudaSuccess) { \
  printf("CUDA ERROR %s at %s:%d: %s\n", cudaGetErrorName(e_), __FILE__, __LINE__, #x); fflush(stdout); _exit(2); } } while (0)

// Waits with a limit: a hang is named and ends the process.
inline void wait_or_die(const char* what, double limit_s = 8) {
  static cudaEvent_t event = [] { cudaEvent_t e; CK(cudaEventCreateWithFlags(&e, cudaEventDisableTiming)); return e; }();
  CK(cudaEventRecord(event, 0));
  auto t0 = std::chrono::steady_clock::now();
  while (true) {
    cudaError_t e = cudaEventQuery(event);
    if (e == cudaSuccess) return;
    if (e != cudaErrorNotReady) { printf("FAIL %s: %s\n", what, cudaGetErrorString(e)); fflush(stdout); _exit(2); }
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count() > limit_s) {
      printf("HANG %s: no end after %.0f s\n", what, limit_s); fflush(stdout); _exit(3);
    }
  }
}

struct Functions {
  const char* name;
  Status (*up)(const FfnUpParams&, Stream);
  Status (*down)(const FfnDownParams&, Stream);
  Status (*down_backward)(const FfnDownBackwardParams&, Stream);
  Status (*up_backward)(const FfnUpBackwardParams&, Stream);
  Status (*weight)(const FfnWeightParams&, Stream);
  Status (*up_gathered)(const FfnUpParams&, Stream, int);
  bool narrow;         // bf16 and SwiGLU only
  bool dry = false;    // wrong on purpose
};
const std::vector<Functions>& variants();

__host__ __device__ inline uint32_t mix(uint64_t x) {
  x ^= x >> 33; x *= 0xff51afd7ed558ccdull; x ^= x >> 33; x *= 0xc4ceb9fe1a85ec53ull; x ^= x >> 33;
  return uint32_t(x >> 16);
}
