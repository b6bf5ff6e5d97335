// A bug for each tool of compute-sanitizer to find: proof that a clean run says something.
#include <cstdio>
#include <cstring>

__global__ void out_of_bounds(int* memory) { memory[threadIdx.x + 32] = 1; }  // 32 are there
__global__ void uninitialised(const int* memory, int* out) { out[threadIdx.x] = memory[threadIdx.x] + 1; }
__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 16) __syncthreads();  // half of the warp never arrives
  out[threadIdx.x] = 1;
}
__global__ void race(int* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[63 - threadIdx.x];  // no barrier between two warps
}
// No bug: a bulk copy writes the memory. initcheck does not see it.
__global__ void bulk_copy(int* memory) {
#if __CUDA_ARCH__ >= 900
  __shared__ alignas(16) int shared[32];
  shared[threadIdx.x] = threadIdx.x;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x > 0) return;
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(memory),
               "r"(unsigned(__cvta_generic_to_shared(shared))), "n"(sizeof(shared))
               : "memory");
  asm volatile("cp.async.bulk.commit_group;");
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

int main(int, char** arguments) {
  int *memory = nullptr, *out = nullptr;
  cudaMalloc(&memory, 32 * sizeof(int));
  cudaMalloc(&out, 64 * sizeof(int));
  if (!strcmp(arguments[1], "memcheck")) out_of_bounds<<<1, 32>>>(memory);
  if (!strcmp(arguments[1], "initcheck")) uninitialised<<<1, 32>>>(memory, out);
  if (!strcmp(arguments[1], "bulk_copy")) bulk_copy<<<1, 32>>>(memory), uninitialised<<<1, 32>>>(memory, out);
  if (!strcmp(arguments[1], "synccheck")) divergent_barrier<<<1, 32>>>(out);
  if (!strcmp(arguments[1], "racecheck")) race<<<1, 64>>>(out);
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) printf("%s\n", cudaGetErrorString(error));
  return 0;
}
