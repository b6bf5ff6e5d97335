// A bug for each tool of compute-sanitizer to find: proof that a clean run says something.
#include <cstdio>
#include <cstring>

__global__ void out_of_bounds(int* memory) { memory[threadIdx.x + 32] = 1; }  // 32 are there
__global__ void uninitialised(const int* memory, int* out) { out[threadIdx.x] = memory[threadIdx.x] + 1; }
__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 16) __syncthreads();  // half of the warp never comes
  out[threadIdx.x] = 1;
}
__global__ void race(int* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[63 - threadIdx.x];  // no barrier between two warps
}

int main(int, char** arguments) {
  int *memory = nullptr, *out = nullptr;
  cudaMalloc(&memory, 32 * sizeof(int));
  cudaMalloc(&out, 64 * sizeof(int));
  if (!strcmp(arguments[1], "memcheck")) out_of_bounds<<<1, 32>>>(memory);
  if (!strcmp(arguments[1], "initcheck")) uninitialised<<<1, 32>>>(memory, out);
  if (!strcmp(arguments[1], "synccheck")) divergent_barrier<<<1, 32>>>(out);
  if (!strcmp(arguments[1], "racecheck")) race<<<1, 64>>>(out);
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) printf("%s\n", cudaGetErrorString(error));
  return 0;
}
