#pragma once
struct Options {
  std::string shapes = "1234", variants, kernels;
  int launches = 7;
  bool quick = false, verbose = false;
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


// tol: what fp32 sums in any order, truncated as tensor cores do, may be off by
constexpr double kSumError = 16 * 0x1p-24;
// out[n, o] = sum_i a[n, i] w[e][o, i], or w[e][i, o]
__global__ void ref_rows(const u16* a, const u16* w, const int* off, int experts, int rows, int outs, int ins, bool tr, bool bf16, double* out, float* tol) {
  size_t id = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  if (id >= size_t(rows) * outs) return;
  int n = id / outs, o = id % outs, e = expert_of(off, experts, n);
  if (e < 0) return;
  const u16* we = w + size_t(e) * outs * ins;
  double s = 0, m = 0;
  for (int i = 0; i < ins; ++i) {
    const double x = double(real_of(a[size_t(n) * ins + i], bf16)) * real_of(tr ? we[size_t(i) * outs + o] : we[size_t(o) * ins + i], bf16);
    s += x; m += fabs(x);
  }
  out[id] = s; tol[id] = float(m * kSumError);
}
__global__ void ref_weight(const u16* g, const u16* in, const int* off, int experts, int outs, int ins, bool bf16, double* out, float* tol) {
  size_t id = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  if (id >= size_t(experts) * outs * ins) return;
  int i = id % ins, o = id / ins % outs, e = id / ins / outs;
  double s = 0, m = 0;
  for (int n = off[e]; n < off[e + 1]; ++n) {
    const double x = double(real_of(g[size_t(n) * outs + o], bf16)) * real_of(in[size_t(n) * ins + i], bf16);
    s += x; m += fabs(x);
  }
  out[id] = s; tol[id] = float(m * kSumError);
}
constexpr double kAct = 1e-6;  // of approximate exponentials
__device__ inline double sig(double x) { return 1 / (1 + exp(-x)); }
__device__ inline double phi(double x) { return 0.5 * erfc(-x * 0.70710678118654752); }
__global__ void ref_act(const double* hidden, const float* tol, int rows, int f, bool gated, const float* w, const int* perm, double* h, float* h_tol) {
  size_t id = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  if (id >= size_t(rows) * f) return;
  int n = id / f, c = id % f, g = gated ? 2 * f : f;
  double a = hidden[size_t(n) * g + c], ta = tol[size_t(n) * g + c], v, t;
  if (gated) {
    const double u = hidden[size_t(n) * g + f + c], tu = tol[size_t(n) * g + f + c], s = sig(a);
    v = a * s * u;
    t = fabs(u * (s + a * s * (1 - s))) * ta + fabs(a * s) * tu + kAct * fabs(v);
  } else {
    v = a * phi(a);
    t = fabs(phi(a) + a * 0.3989422804014327 * exp(-0.5 * a * a)) * ta + kAct * fabs(a);
  }
  const double ww = w ? double(w[perm[n]]) : 1.0;
  h[id] = v * ww;
  h_tol[id] = float(fabs(ww) * t);
}
// one thread a row
__global__ void ref_act_backward(const double* dh, const float* tol, const u16* hidden, int rows, int f, bool gated, const float* w, const int* perm, bool bf16, double* dhidden, float* dhidden_tol, double* h, float* h_tol, double* dw, float* dw_tol) {
  int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= rows) return;
  int g = gated ? 2 * f : f;
  double ww = w ? double(w[perm[n]]) : 1.0, sum = 0, all = 0;
  for (int c = 0; c < f; ++c) {
    const double a = real_of(hidden[size_t(n) * g + c], bf16), d = dh[size_t(n) * f + c], t = tol[size_t(n) * f + c];
    double v;
    const auto put = [&](size_t at, double slope) {
      dhidden[at] = ww * d * slope;
      dhidden_tol[at] = float(ww * (fabs(slope) * t + kAct * fabs(d) * (1 + fabs(a) + fabs(slope))));
    };
    if (gated) {
      const double u = real_of(hidden[size_t(n) * g + f + c], bf16), s = sig(a);
      v = a * s * u;
      put(size_t(n) * g + c, u * (s + a * s * (1 - s)));
      put(size_t(n) * g + f + c, a * s);
    } else {
      v = a * phi(a);
      put(size_t(n) * g + c, phi(a) + a * 0.3989422804014327 * exp(-0.5 * a * a));
    }
    h[size_t(n) * f + c] = ww * v;
    h_tol[size_t(n) * f + c] = float(kAct * ww * (fabs(a) + fabs(v)));
    sum += d * v;
    all += fabs(d * v) * 2 * kSumError + fabs(v) * t + kAct * fabs(d) * (fabs(a) + fabs(v));
  }
  dw[n] = sum; dw_tol[n] = float(all + 1e-6);
}

struct Worst { float ratio; unsigned wrong; };
// Ratio of the error to what the sums and the last rounding allow; exact: bits of the rounded reference.
__global__ void compare16(const u16* got, const double* ref, const float* tol, size_t n, bool bf16, bool exact, Worst* worst) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    float g = real_of(got[i], bf16);
    double r = ref[i];
    float ratio;
    if (exact) ratio = g == real_of(bits_of(float(r), bf16), bf16) ? 0 : 1e9f;
    else ratio = float(fabs(g - r) / ((bf16 ? 0x1p-8 : 0x1p-11) * 1.05 * fabs(r) + tol[i] + 1e-7));
    if (!(ratio <= 1)) { atomicAdd(&worst->wrong, 1u); if (!(ratio == ratio)) ratio = 3e38f; }
    atomicMax(reinterpret_cast<int*>(&worst->ratio), __float_as_int(ratio));
  }
}
__global__ void compare_bits(const u16* got, size_t n, u16 expected, Worst* worst) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    if (got[i] != expected) { atomicAdd(&worst->wrong, 1u); worst->ratio = 2e9f; }
  }
}
__global__ void digest16(const u16* p, size_t n, unsigned long long* sum) {
  unsigned long long s = 0;
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) s += (unsigned long long)mix(i * 65536 + p[i] + 77);
  atomicAdd(sum, s);
}
