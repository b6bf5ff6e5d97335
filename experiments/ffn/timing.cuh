#pragma once
// Sampled outputs against fp64 sums: sample i takes row/column by hash.
__global__ void spot_rows(const u16* a, const u16* w, const int* off, int experts, int rows, int outs, int ins, bool tr, const u16* got, double scale_abs, Worst* worst) {
  const int id = blockIdx.x, lane = threadIdx.x;
  const int n = mix(id * 3 + 1) % rows, o = mix(id * 3 + 2) % outs, e = expert_of(off, experts, n);
  if (e < 0) return;
  const u16* we = w + size_t(e) * outs * ins;
  double s = 0;
  for (int i = lane; i < ins; i += 32) s += double(real_of(a[size_t(n) * ins + i], true)) * real_of(tr ? we[size_t(i) * outs + o] : we[size_t(o) * ins + i], true);
  for (int m = 16; m; m /= 2) s += __shfl_xor_sync(~0u, s, m);
  if (lane == 0) {
    float g = real_of(got[size_t(n) * outs + o], true), ratio = float(fabs(g - s) / (1.05 * 0x1p-8 * fabs(s) + scale_abs));
    if (!(ratio <= 1)) { atomicAdd(&worst->wrong, 1u); if (ratio != ratio) ratio = 3e38f; }
    atomicMax(reinterpret_cast<int*>(&worst->ratio), __float_as_int(ratio));
  }
}
__global__ void spot_weight(const u16* g, const u16* in, const int* off, int experts, int outs, int ins, const u16* got, double scale_abs, Worst* worst) {
  const int id = blockIdx.x, lane = threadIdx.x;
  const int e = mix(id * 3) % experts, o = mix(id * 3 + 1) % outs, i = mix(id * 3 + 2) % ins;
  double s = 0;
  for (int n = off[e] + lane; n < off[e + 1]; n += 32) s += double(real_of(g[size_t(n) * outs + o], true)) * real_of(in[size_t(n) * ins + i], true);
  for (int m = 16; m; m /= 2) s += __shfl_xor_sync(~0u, s, m);
  if (lane == 0) {
    float v = real_of(got[(size_t(e) * outs + o) * ins + i], true), ratio = float(fabs(v - s) / (1.05 * 0x1p-8 * fabs(s) + scale_abs));
    if (!(ratio <= 1)) { atomicAdd(&worst->wrong, 1u); if (ratio != ratio) ratio = 3e38f; }
    atomicMax(reinterpret_cast<int*>(&worst->ratio), __float_as_int(ratio));
  }
}

// Gradients by gate and up, and h, of sampled places; all weights are w.
__global__ void spot_down_backward(const u16* dy, const u16* down, const u16* hidden, const int* off, int experts, int rows, int d, int f, double w, const u16* dhidden, const u16* h, Worst* worst) {
  const int id = blockIdx.x, lane = threadIdx.x;
  const int n = mix(id * 3 + 1) % rows, o = mix(id * 3 + 2) % f, e = expert_of(off, experts, n);
  if (e < 0) return;
  double s = 0;
  for (int i = lane; i < d; i += 32) s += double(real_of(dy[size_t(n) * d + i], true)) * real_of(down[(size_t(e) * d + i) * f + o], true);
  for (int m = 16; m; m /= 2) s += __shfl_xor_sync(~0u, s, m);
  if (lane > 2) return;
  const double a = real_of(hidden[size_t(n) * 2 * f + o], true), u = real_of(hidden[size_t(n) * 2 * f + f + o], true), g = sig(a);
  const double ref = lane == 0 ? w * s * u * (g + a * g * (1 - g)) : lane == 1 ? w * s * a * g : w * a * g * u;
  const float got = real_of(lane < 2 ? dhidden[size_t(n) * 2 * f + lane * f + o] : h[size_t(n) * f + o], true);
  float ratio = float(fabs(got - ref) / (1.05 * 0x1p-8 * fabs(ref) + 1e-3));
  if (!(ratio <= 1)) { atomicAdd(&worst->wrong, 1u); if (ratio != ratio) ratio = 3e38f; }
  atomicMax(reinterpret_cast<int*>(&worst->ratio), __float_as_int(ratio));
}
// Gradients of the combine weights of sampled rows, a block each.
__global__ void spot_weights(const u16* dy, const u16* down, const u16* hidden, const int* off, int experts, int rows, int d, int f, const int* perm, const float* dw, Worst* worst) {
  __shared__ double sum;
  const int n = mix(blockIdx.x * 5 + 3) % rows, e = expert_of(off, experts, n);
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  if (e < 0) return;
  for (int o = threadIdx.x; o < f; o += blockDim.x) {
    double s = 0;
    for (int i = 0; i < d; ++i) s += double(real_of(dy[size_t(n) * d + i], true)) * real_of(down[(size_t(e) * d + i) * f + o], true);
    const double a = real_of(hidden[size_t(n) * 2 * f + o], true), u = real_of(hidden[size_t(n) * 2 * f + f + o], true);
    atomicAdd(&sum, s * a * sig(a) * u);
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  float ratio = float(fabs(dw[perm[n]] - sum) / (2e-3 * (1 + fabs(sum))));
  if (!(ratio <= 1)) { atomicAdd(&worst->wrong, 1u); if (ratio != ratio) ratio = 3e38f; }
  atomicMax(reinterpret_cast<int*>(&worst->ratio), __float_as_int(ratio));
}

__global__ void read_all(const uint4* from, size_t n, float* to) {
  unsigned x = 0;
#pragma unroll 8
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    const uint4 v = __ldcs(from + i);
    x ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (x == 0x12345678) *to = 1;
}

struct Shape5 { int t, d, f, e, k; };
inline int time_all(const Options& o) {
  const Shape5 shapes[5] = {{4096, 4096, 2048, 64, 2}, {4096, 4096, 14336, 8, 2}, {32768, 2048, 768, 128, 8}, {16384, 4096, 1024, 64, 8}, {4096, 4096, 11008, 64, 2}};
  size_t most_x = 0, most_hidden = 0, most_up = 0, most_rows = 0;
  for (int i = 0; i < 5; ++i) if (o.shapes.find(char('1' + i)) != std::string::npos) {
    const Shape5& s = shapes[i];
    most_rows = std::max(most_rows, size_t(s.t) * s.k);
    most_x = std::max(most_x, size_t(s.t) * s.k * s.d);
    most_hidden = std::max(most_hidden, size_t(s.t) * s.k * 2 * s.f);
    most_up = std::max(most_up, size_t(s.e) * 2 * s.f * s.d);
  }
  const auto get = [](size_t n) { u16* p; CK(cudaMalloc(&p, n * 2)); return p; };
  u16 *x = get(most_x), *dy = get(most_x), *out = get(most_x), *dx = get(most_x), *hidden = get(most_hidden), *dhidden = get(most_hidden), *h = get(most_hidden / 2), *h2 = get(most_hidden / 2);
  u16 *up = get(most_up), *down = get(most_up / 2), *dup = get(most_up), *ddown = get(most_up / 2);
  float *weights = reinterpret_cast<float*>(get(most_rows * 2)), *dweights = reinterpret_cast<float*>(get(most_rows * 2)), *workspace = reinterpret_cast<float*>(get(most_rows * 2 * 64));
  int *off = reinterpret_cast<int*>(get(2050)), *perm = reinterpret_cast<int*>(get(most_rows * 2)), *inverse = reinterpret_cast<int*>(get(most_rows * 2));
  Worst* worst; CK(cudaMalloc(&worst, sizeof(Worst)));
  fill(x, most_x, 1, 1, 0, true); fill(dy, most_x, 2, 1, 0, true); fill(hidden, most_hidden, 3, 1, 0, true); fill(dhidden, most_hidden, 4, 1, 0, true); fill(h, most_hidden / 2, 5, 1, 0, true);
  fill(up, most_up, 6, 0.02f, 0, true); fill(down, most_up / 2, 7, 0.02f, 0, true);
  wait_or_die("fill", 20);
  cudaEvent_t begin, end;
  CK(cudaEventCreate(&begin)); CK(cudaEventCreate(&end));
  bool all_ok = true;
  for (int i = 0; i < 5; ++i) {
    if (o.shapes.find(char('1' + i)) == std::string::npos) continue;
    const Shape5& s = shapes[i];
    const int n = s.t * s.k, g = 2 * s.f;
    std::mt19937 rng(7);
    std::vector<int> id(n), count(s.e + 1, 0), order(n);
    for (int t = 0; t < s.t; ++t) for (int k = 0; k < s.k; ++k) {
      bool again = true;
      while (again) { id[t * s.k + k] = rng() % s.e; again = false; for (int j = 0; j < k; ++j) again |= id[t * s.k + j] == id[t * s.k + k]; }
      ++count[id[t * s.k + k] + 1];
    }
    for (int e = 0; e < s.e; ++e) count[e + 1] += count[e];
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return id[a] < id[b]; });
    std::vector<float> w(n, 0.5f);
    CK(cudaMemcpy(off, count.data(), count.size() * 4, cudaMemcpyHostToDevice));
    CK(cudaMemcpy(perm, order.data(), n * 4, cudaMemcpyHostToDevice));
    std::vector<int> back(n);
    for (int r = 0; r < n; ++r) back[order[r]] = r;
    CK(cudaMemcpy(inverse, back.data(), n * 4, cudaMemcpyHostToDevice));
    CK(cudaMemcpy(weights, w.data(), n * 4, cudaMemcpyHostToDevice));
    const FfnShape shape{n, s.d, s.f, s.e, Activation::kSwiglu, DType::kBf16};
    const double flops = 2.0 * n * s.d * s.f;
    const double bx = 2.0 * n * s.d, bf = 2.0 * n * s.f, bup = 4.0 * s.e * s.f * s.d, bdown = bup / 2;
    printf("shape %d: T=%d D=%d F=%d E=%d K=%d\n", i + 1, s.t, s.d, s.f, s.e, s.k);
    // A kernel as all variants run it. `launch` is empty where a variant has none.
    struct Timed {
      const char *kernel, *label;
      double flops, bytes;
      std::function<Status(const Functions&)> launch;
      std::function<bool(const Functions&)> has;
      std::function<void()> spot;
    };
    const int samples = 2000;
    const auto always = [](const Functions&) { return true; };
    const auto first = [](const Functions& v) { return &v == &variants()[0]; };
    const auto gathers = [](const Functions& v) { return v.up_gathered != nullptr; };
    const std::vector<Timed> list = {
        {"floor", "read up", 0, bup, [&](const Functions&) { read_all<<<132 * 8, 512>>>(reinterpret_cast<const uint4*>(up), size_t(bup) / 16, workspace); return launched(); }, first, [] {}},
        {"floor", "write up", 0, bup, [&](const Functions&) { return cudaMemsetAsync(dup, 0, size_t(bup)) == cudaSuccess ? Status{} : Status{Code::kCuda}; }, first, [] {}},
        {"floor", "copy up", 0, 2 * bup, [&](const Functions&) { return cudaMemcpyAsync(dup, up, size_t(bup), cudaMemcpyDeviceToDevice) == cudaSuccess ? Status{} : Status{Code::kCuda}; }, first, [] {}},
        {"up", "up", 2 * flops, bx + 3 * bf + bup, [&](const Functions& v) { return v.up({x, up, off, {weights, perm}, hidden, h, shape}, nullptr); }, always,
         [&] { spot_rows<<<samples, 32>>>(x, up, off, s.e, n, g, s.d, false, hidden, 1e-3, worst); }},
        {"up_infer", "up (infer)", 2 * flops, bx + bf + bup, [&](const Functions& v) { return v.up({x, up, off, {weights, perm}, nullptr, h, shape}, nullptr); }, always, [] {}},
        {"up_gather", "permute", 0, bx + bx / s.k, [&](const Functions&) { return permute({x, inverse, dx, {s.t, s.d, s.k, DType::kBf16}}, nullptr); }, gathers, [] {}},
        {"up_gather", "permute and up", 2 * flops, 2 * bx + bx / s.k + 3 * bf + bup, [&](const Functions& v) {
           const Status status = permute({x, inverse, dx, {s.t, s.d, s.k, DType::kBf16}}, nullptr);
           return status.ok() ? v.up({dx, up, off, {weights, perm}, dhidden, h2, shape}, nullptr) : status; }, always, [] {}},
        {"up_gather", "up gathering", 2 * flops, bx / s.k + 3 * bf + bup, [&](const Functions& v) { return v.up_gathered({x, up, off, {weights, perm}, dhidden, h2, shape}, nullptr, s.k); }, gathers,
         [&] { spot_rows<<<samples, 32>>>(dx, up, off, s.e, n, g, s.d, false, dhidden, 1e-3, worst); }},
        {"down", "down", flops, bx + bf + bdown, [&](const Functions& v) { return v.down({h, down, off, out, shape}, nullptr); }, always,
         [&] { spot_rows<<<samples, 32>>>(h, down, off, s.e, n, s.d, s.f, false, out, 1e-3, worst); }},
        {"down_backward", "down backward", flops, bx + 5 * bf + bdown, [&](const Functions& v) { return v.down_backward({dy, down, hidden, off, {weights, perm}, dhidden, h2, dweights, workspace, shape}, nullptr); },
         [](const Functions& v) { return v.down_backward != nullptr; },
         [&] {
           spot_down_backward<<<samples, 32>>>(dy, down, hidden, off, s.e, n, s.d, s.f, 0.5, dhidden, h2, worst);
           spot_weights<<<32, 1024>>>(dy, down, hidden, off, s.e, n, s.d, s.f, perm, dweights, worst);
         }},
        {"up_backward", "up backward", 2 * flops, bx + 2 * bf + bup, [&](const Functions& v) { return v.up_backward({dhidden, up, off, dx, shape}, nullptr); }, always,
         [&] { spot_rows<<<samples, 32>>>(dhidden, up, off, s.e, n, s.d, g, true, dx, 5e-3, worst); }},
        {"weight", "weight up", 2 * flops, bx + 2 * bf + bup, [&](const Functions& v) { return v.weight({dhidden, x, off, dup, n, g, s.d, s.e, DType::kBf16}, nullptr); }, always,
         [&] { spot_weight<<<samples, 32>>>(dhidden, x, off, s.e, g, s.d, dup, 5e-3, worst); }},
        {"weight_down", "weight down", flops, bx + bf + bdown, [&](const Functions& v) { return v.weight({dy, h, off, ddown, n, s.d, s.f, s.e, DType::kBf16}, nullptr); }, always,
         [&] { spot_weight<<<samples, 32>>>(dy, h, off, s.e, s.d, s.f, ddown, 5e-3, worst); }},
    };
    for (const Timed& t : list) {
      if (!o.kernel(t.kernel)) continue;
      struct One { const Functions* v; std::vector<double> us; bool wrong = false; float ratio = 0; };
      std::vector<One> all;
      for (const Functions& v : variants()) if ((o.variant(v.name) || std::string(t.kernel) == "floor") && t.has(v)) all.push_back({&v, {}});
      for (One& one : all) {  // warm up, and see that it is right
        char what[128];
        snprintf(what, sizeof what, "time shape %d %s %s", i + 1, t.label, one.v->name);
        Status status;
        for (int r = 0; r < (o.profile ? 3 : 2) && status.ok(); ++r) status = t.launch(*one.v);
        if (!status.ok()) { printf("FAIL %s: status %s cuda %d\n", what, rule(status.code), status.cuda_error); all_ok = false; cudaGetLastError(); one.v = nullptr; continue; }
        wait_or_die(what);
        if (o.profile) { printf("  %-14s %-8s launched 3 times\n", t.label, one.v->name); continue; }
        CK(cudaMemsetAsync(worst, 0, sizeof(Worst)));
        t.spot();
        wait_or_die("spot");
        Worst got; CK(cudaMemcpy(&got, worst, sizeof got, cudaMemcpyDeviceToHost));
        one.wrong = got.wrong > 0; one.ratio = got.ratio;
        if (got.wrong && !one.v->dry) all_ok = false;
      }
      if (o.profile) continue;
      // Variants in turn, so that all see the same clocks; launches in a row, as in a step.
      for (int round = 0; round < o.rounds; ++round) for (One& one : all) {
        if (!one.v) continue;
        t.launch(*one.v);
        CK(cudaEventRecord(begin));
        for (int r = 0; r < o.launches; ++r) t.launch(*one.v);
        CK(cudaEventRecord(end));
        wait_or_die(t.label);
        float ms; CK(cudaEventElapsedTime(&ms, begin, end));
        one.us.push_back(ms * 1000 / o.launches);
      }
      double base = 0;
      for (One& one : all) {
        if (!one.v) continue;
        std::sort(one.us.begin(), one.us.end());
        const double median = one.us[one.us.size() / 2];
        if (base == 0) base = median;
        printf("  %-14s %-8s %8.1f us (%8.1f to %8.1f) %5.2fx | %6.1f TFLOP/s %7.1f GB/s | spot %s %.2f\n", t.label, one.v->name, median, one.us[0], one.us.back(), base / median, t.flops / median / 1e6, t.bytes / median / 1e3, one.v->dry ? "dry" : one.wrong ? "WRONG" : "ok", one.ratio);
      }
    }
  }
  printf("%s\n", all_ok ? "TIME DONE" : "TIME DONE, SOME WRONG");
  return all_ok ? 0 : 4;
}
