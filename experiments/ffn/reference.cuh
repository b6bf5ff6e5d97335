#pragma once
struct Options {
  std::string shapes = "12345", variants, kernels;
  int launches = 5;
  bool quick = false, verbose = false, profile = false;
  int rounds = 5;
  bool variant(const char* n) const { return variants.empty() || variants.find(std::string(",") + n + ",") != std::string::npos; }
  bool kernel(const char* n) const { return kernels.empty() || kernels.find(std::string(",") + n + ",") != std::string::npos; }
};

__host__ __device__ inline float real_of(u16 b, bool bf16) { return bf16 ? Bf16::to_real(int16_t(b)) : Fp16::to_real(int16_t(b)); }
__host__ __device__ inline u16 bits_of(float x, bool bf16) { return u16(bf16 ? Bf16::from_real(x) : Fp16::from_real(x)); }

// kind 0: roughly normal times scale; 1: integers -2..2; 2: NaN
__global__ void fill16(u16* p, size_t n, uint64_t seed, float scale, int kind, bool bf16) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    uint32_t a = mix(i * 2 + seed * 0x9e3779b97f4a7c15ull), b = mix(i * 2 + 1 + seed * 0x9e3779b97f4a7c15ull);
    float v;
    if (kind == 0) {
      v = (float(a & 0xffff) + float(a >> 16) + float(b & 0xffff) + float(b >> 16)) / 65536.0f - 2.0f;
      v *= 1.7320508f * scale;
    } else v = float(int(a % 5) - 2);
    p[i] = kind == 2 ? 0xffff : bits_of(v, bf16);
  }
}
inline void fill(u16* p, size_t n, uint64_t seed, float scale, int kind, bool bf16) {
  if (n == 0) return;
  fill16<<<int(std::min<size_t>((n + 255) / 256, 132 * 16)), 256>>>(p, n, seed, scale, kind, bf16);
  CK(cudaGetLastError());
}

__device__ inline int expert_of(const int* off, int experts, int row) {
  for (int e = 0; e < experts; ++e) if (row < off[e + 1]) return e;
  return -1;
}

__global__ void gather_rows(const u16* tokens, const int* perm, int top_k, int width, u16* rows) {
  for (int i = threadIdx.x; i < width; i += blockDim.x) rows[size_t(blockIdx.x) * width + i] = tokens[size_t(perm[blockIdx.x] / top_k) * width + i];
}

// What fp32 sums of n products a b in tensor cores may miss. Products are exact; each step of 16 cuts what is below the
// last bit of the largest term or of the sum so far, toward zero, so up to 2^-23 of it. A sum of n random terms stays
// near sqrt(n) of one, while magnitude = sum |a b| grows with n: n / 16 steps miss about sqrt(n) / 15 * 2^-24 * magnitude
// in the mean, with one sign; sums that happen to be large on the way miss about twice that. The bound that always
// holds, n / 8 * 2^-24 * magnitude, is 30 times wider and would hide errors.
__device__ inline double missing(double magnitude, int n) { return (2 + sqrt(double(n)) / 8) * 0x1p-24 * magnitude; }

// out[n, o] = sum_i a[n, i] w[e][o, i], or w[e][i, o]; and what it may miss
__global__ void ref_rows(const u16* a, const u16* w, const int* off, int experts, int rows, int outs, int ins, bool tr, bool bf16, double* out, double* miss) {
  size_t id = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  if (id >= size_t(rows) * outs) return;
  int n = id / outs, o = id % outs, e = expert_of(off, experts, n);
  if (e < 0) return;
  const u16* we = w + size_t(e) * outs * ins;
  double s = 0, m = 0;
  for (int i = 0; i < ins; ++i) {
    const double x = double(real_of(a[size_t(n) * ins + i], bf16)) * real_of(tr ? we[size_t(i) * outs + o] : we[size_t(o) * ins + i], bf16);
    s += x;
    m += fabs(x);
  }
  out[id] = s;
  miss[id] = missing(m, ins);
}
__global__ void ref_weight(const u16* g, const u16* in, const int* off, int experts, int outs, int ins, bool bf16, double* out, double* miss) {
  size_t id = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  if (id >= size_t(experts) * outs * ins) return;
  int i = id % ins, o = id / ins % outs, e = id / ins / outs;
  double s = 0, m = 0;
  for (int n = off[e]; n < off[e + 1]; ++n) {
    const double x = double(real_of(g[size_t(n) * outs + o], bf16)) * real_of(in[size_t(n) * ins + i], bf16);
    s += x;
    m += fabs(x);
  }
  out[id] = s;
  miss[id] = missing(m, off[e + 1] - off[e]);
}
__device__ inline double sig(double x) { return 1 / (1 + exp(-x)); }
__device__ inline double phi(double x) { return 0.5 * erfc(-x * 0.70710678118654752); }
__global__ void ref_act(const double* hidden, int rows, int f, bool gated, const float* w, const int* perm, double* h) {
  size_t id = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  if (id >= size_t(rows) * f) return;
  int n = id / f, c = id % f, g = gated ? 2 * f : f;
  double a = hidden[size_t(n) * g + c], v = gated ? a * sig(a) * hidden[size_t(n) * g + f + c] : a * phi(a);
  h[id] = v * (w ? double(w[perm[n]]) : 1.0);
}
// one thread a row
__global__ void ref_act_backward(const double* dh, const u16* hidden, int rows, int f, bool gated, const float* w, const int* perm, bool bf16, double* dhidden, double* h, double* dw) {
  int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= rows) return;
  int g = gated ? 2 * f : f;
  double ww = w ? double(w[perm[n]]) : 1.0, sum = 0;
  for (int c = 0; c < f; ++c) {
    double a = real_of(hidden[size_t(n) * g + c], bf16), d = dh[size_t(n) * f + c], v;
    if (gated) {
      double u = real_of(hidden[size_t(n) * g + f + c], bf16), s = sig(a);
      v = a * s * u;
      dhidden[size_t(n) * g + c] = ww * d * u * (s + a * s * (1 - s));
      dhidden[size_t(n) * g + f + c] = ww * d * a * s;
    } else {
      v = a * phi(a);
      dhidden[size_t(n) * g + c] = ww * d * (phi(a) + a * 0.3989422804014327 * exp(-0.5 * a * a));
    }
    h[size_t(n) * f + c] = ww * v;
    sum += d * v;
  }
  dw[n] = sum;
}

struct Worst { float ratio; unsigned wrong; };
// Ratio of the error to what rounding allows: half a unit of the result, and what the sum may miss, or without `miss`,
// of results that went through an activation, a part of them; exact: bits of the rounded reference.
__global__ void compare16(const u16* got, const double* ref, const double* miss, size_t n, bool bf16, bool exact, Worst* worst) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    float g = real_of(got[i], bf16);
    double r = ref[i];
    float ratio;
    if (exact) ratio = g == real_of(bits_of(float(r), bf16), bf16) ? 0 : 1e9f;
    else if (miss) ratio = float(fabs(g - r) / ((bf16 ? 0x1p-8 : 0x1p-11) * (fabs(r) + miss[i]) + miss[i] + (bf16 ? 1e-38 : 0x1p-25)));
    else ratio = float(fabs(g - r) / (1.05 * (bf16 ? 0x1p-8 : 0x1p-11) * fabs(r) + 3e-5 * (1 + fabs(r))));
    if (!(ratio <= 1)) { atomicAdd(&worst->wrong, 1u); if (!(ratio == ratio)) ratio = 3e38f; }
    atomicMax(reinterpret_cast<int*>(&worst->ratio), __float_as_int(ratio));
  }
}
__global__ void compare_bits(const u16* got, size_t n, u16 expected, Worst* worst) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    if (got[i] != expected) { atomicAdd(&worst->wrong, 1u); worst->ratio = 2e9f; }
  }
}
