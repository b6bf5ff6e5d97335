#pragma once
struct Tally { float worst = 0; long cases = 0, bad = 0; };

struct Check {
  size_t kMaxRows = 1700, kMaxD = 600, kMaxF = 600, kMaxE = 80;
  u16 *rows, *up, *down, *hidden_in, *h_in, *dy, *dhidden_in;  // inputs
  u16 *tokens, *gathered;
  u16 *out, *out2;                                             // outputs
  double *ref, *ref2, *ref_h, *miss;
  double* ref_dw;
  float *weights, *grad_weights, *workspace;
  int *off, *perm;
  Worst* worst;

  template <class T> T* get(size_t n) { T* p; CK(cudaMalloc(&p, n * sizeof(T))); return p; }
  Check() {
    const size_t wide = kMaxRows * 2 * kMaxF, weight = kMaxE * 2 * kMaxF * kMaxD;
    tokens = get<u16>(kMaxRows * kMaxD); gathered = get<u16>(kMaxRows * kMaxD);
    rows = get<u16>(kMaxRows * kMaxD); up = get<u16>(weight); down = get<u16>(weight / 2); hidden_in = get<u16>(wide);
    h_in = get<u16>(wide / 2); dy = get<u16>(kMaxRows * kMaxD); dhidden_in = get<u16>(wide);
    out = get<u16>(std::max(weight, wide)); out2 = get<u16>(std::max(weight, wide));
    ref = get<double>(std::max(weight, wide)); miss = get<double>(std::max(weight, wide)); ref2 = get<double>(wide); ref_h = get<double>(wide / 2); ref_dw = get<double>(kMaxRows);
    weights = get<float>(kMaxRows); grad_weights = get<float>(kMaxRows); workspace = get<float>(kMaxRows * 64);
    off = get<int>(kMaxE + 1); perm = get<int>(kMaxRows);
    worst = get<Worst>(1);
  }
};

inline unsigned grid(size_t n) { return unsigned((n + 127) / 128); }

inline std::vector<int> make_offsets(int pattern, int rows, int experts, std::mt19937& rng) {
  std::vector<int> count(experts, 0);
  int live = rows;
  if (pattern == 1 || pattern == 4) live = rows - rows / 5;  // dropped slots
  const int first = pattern == 2 ? experts / 3 + (experts > 1) : 0, last = pattern == 3 ? (experts + 1) / 2 : experts;
  if (pattern == 4) for (int i = 0; i < live; ++i) ++count[std::min<int>(experts - 1, int(rng() % experts) & int(rng()))];
  else if (pattern == 5) count[experts / 2] = live;
  else if (pattern == 6) live = 0;
  else for (int i = 0; i < live && first < experts; ++i) ++count[first + rng() % std::max(1, last - first)];
  std::vector<int> off(experts + 1, 0);
  for (int e = 0; e < experts; ++e) off[e + 1] = off[e] + count[e];
  return off;
}

inline int check_all(const Options& o) {
  Check c;
  std::mt19937 rng(1);
  struct Size { int rows, d, f, e; };
  std::vector<Size> sizes = {{1500, 512, 384, 5}, {700, 72, 40, 33}, {77, 8, 8, 3}, {1, 64, 64, 1}, {1600, 264, 328, 70}, {640, 584, 136, 4}, {0, 64, 128, 4}};
  if (o.quick) sizes = {{700, 264, 136, 5}, {77, 72, 40, 3}};
  const auto& vs = variants();
  std::vector<std::string> names = {"up.hidden", "up.h", "up.h(infer)", "down.out", "down_bwd.dhidden", "down_bwd.h", "down_bwd.dw", "up_bwd.dx", "wgrad.up", "wgrad.down", "up.gather.hidden", "up.gather.h"};
  std::vector<std::vector<Tally>> tally(vs.size(), std::vector<Tally>(names.size()));
  bool all_ok = true;
  for (bool bf16 : {true, false}) for (bool gated : {true, false}) for (const Size& s : sizes) for (int pattern = 0; pattern < 7; ++pattern) {
    if (s.rows == 0 && pattern > 0) continue;
    const bool exact = pattern % 2 == 0 && s.d <= 512;
    const int g = gated ? 2 * s.f : s.f;
    const std::vector<int> off = make_offsets(pattern, s.rows, s.e, rng);
    const int live = off[s.e];
    std::vector<int> perm(s.rows);
    std::iota(perm.begin(), perm.end(), 0);
    std::shuffle(perm.begin(), perm.end(), rng);
    std::vector<float> w(s.rows);
    for (auto& x : w) x = 0.1f + 0.8f * float(rng() % 1000) / 1000;
    CK(cudaMemcpy(c.off, off.data(), off.size() * 4, cudaMemcpyHostToDevice));
    if (s.rows) CK(cudaMemcpy(c.perm, perm.data(), s.rows * 4, cudaMemcpyHostToDevice));
    if (s.rows) CK(cudaMemcpy(c.weights, w.data(), s.rows * 4, cudaMemcpyHostToDevice));
    const float* weights = pattern == 3 ? nullptr : c.weights;
    const int kind = exact ? 1 : 0;
    const auto input = [&](u16* p, size_t width, uint64_t seed) {
      fill(p, s.rows * width, seed, 1.0f, kind, bf16);
      fill(p + live * width, (s.rows - live) * width, seed, 1.0f, 2, bf16);
    };
    const uint64_t seed = rng();
    input(c.rows, s.d, seed); input(c.hidden_in, g, seed + 1); input(c.h_in, s.f, seed + 2); input(c.dy, s.d, seed + 3); input(c.dhidden_in, g, seed + 4);
    fill(c.up, size_t(s.e) * g * s.d, seed + 5, 1 / std::sqrt(float(s.d)), kind, bf16);
    fill(c.down, size_t(s.e) * s.d * s.f, seed + 6, 1 / std::sqrt(float(s.f)), kind, bf16);
    const FfnShape shape{s.rows, s.d, s.f, s.e, gated ? Activation::kSwiglu : Activation::kGelu, bf16 ? DType::kBf16 : DType::kFp16};
    char what[200];
    const auto run = [&](int v, int index, const char* kernel, Status status, std::function<void()> compare) {
      snprintf(what, sizeof what, "%s %s rows=%d live=%d D=%d F=%d E=%d pattern=%d %s %s", vs[v].name, names[index].c_str(), s.rows, live, s.d, s.f, s.e, pattern, bf16 ? "bf16" : "fp16", gated ? "swiglu" : "gelu");
      (void)kernel;
      if (!status.ok()) { printf("FAIL %s: status %s cuda %d\n", what, rule(status.code), status.cuda_error); all_ok = false; ++tally[v][index].bad; cudaGetLastError(); return; }
      CK(cudaMemsetAsync(c.worst, 0, sizeof(Worst)));
      compare();
      wait_or_die(what);
      Worst worst;
      CK(cudaMemcpy(&worst, c.worst, sizeof worst, cudaMemcpyDeviceToHost));
      Tally& t = tally[v][index];
      t.worst = std::max(t.worst, worst.ratio);
      ++t.cases;
      if (worst.wrong) { ++t.bad; all_ok = false; if (t.bad <= 6 || o.verbose) printf("FAIL %s: %u wrong, worst ratio %g%s\n", what, worst.wrong, worst.ratio, exact ? " (exact)" : ""); }
    };
    const auto same = [&](const u16* got, const double* ref, size_t width, bool is_exact) {
      if (live) compare16<<<256, 256>>>(got, ref, ref == c.ref ? c.miss : nullptr, live * width, bf16, is_exact, c.worst);
      if (s.rows > live) compare_bits<<<256, 256>>>(got + live * width, (s.rows - live) * width, 0xffff, c.worst);
    };
    const auto nan = [&](u16* p, size_t n) { if (n) CK(cudaMemsetAsync(p, 0xff, n * 2)); };
    const auto each = [&](auto f) {
      for (size_t v = 0; v < vs.size(); ++v) if (o.variant(vs[v].name) && !vs[v].dry && !(vs[v].narrow && !(bf16 && gated))) f(int(v));
    };
    // up
    if (o.kernel("up")) {
      if (s.rows) {
        ref_rows<<<grid(size_t(s.rows) * g), 128>>>(c.rows, c.up, c.off, s.e, s.rows, g, s.d, false, bf16, c.ref, c.miss);
        ref_act<<<grid(size_t(s.rows) * s.f), 128>>>(c.ref, s.rows, s.f, gated, weights, c.perm, c.ref_h);
        wait_or_die("reference up");
      }
      each([&](int v) {
        nan(c.out, size_t(s.rows) * g); nan(c.out2, size_t(s.rows) * s.f);
        FfnUpParams p{c.rows, c.up, c.off, {weights, c.perm}, c.out, c.out2, shape};
        Status status = vs[v].up(p, nullptr);
        run(v, 0, "up", status, [&] { same(c.out, c.ref, g, exact); });
        if (!exact) run(v, 1, "up", status, [&] { same(c.out2, c.ref_h, s.f, false); });
        nan(c.out2, size_t(s.rows) * s.f);
        p.hidden = nullptr;
        status = vs[v].up(p, nullptr);
        if (!exact) run(v, 2, "up", status, [&] { same(c.out2, c.ref_h, s.f, false); });
      });
    }
    if (o.kernel("up_gather")) {
      const int top_k = 1 + int(seed % 3);
      fill(c.tokens, size_t(s.rows) * s.d, seed + 7, 1.0f, kind, bf16);
      if (s.rows) {
        gather_rows<<<s.rows, 64>>>(c.tokens, c.perm, top_k, s.d, c.gathered);
        ref_rows<<<grid(size_t(s.rows) * g), 128>>>(c.gathered, c.up, c.off, s.e, s.rows, g, s.d, false, bf16, c.ref, c.miss);
        ref_act<<<grid(size_t(s.rows) * s.f), 128>>>(c.ref, s.rows, s.f, gated, weights, c.perm, c.ref_h);
        // tokens behind the last that a slot names must not be read
        const int tokens = (s.rows + top_k - 1) / top_k;
        fill(c.tokens + size_t(tokens) * s.d, size_t(s.rows - tokens) * s.d, seed, 1.0f, 2, bf16);
        wait_or_die("reference up_gather");
      }
      each([&](int v) {
        if (!s.rows || !vs[v].up_gathered) return;
        nan(c.out, size_t(s.rows) * g); nan(c.out2, size_t(s.rows) * s.f);
        Status status = vs[v].up_gathered({c.tokens, c.up, c.off, {weights, c.perm}, c.out, c.out2, shape}, nullptr, top_k);
        run(v, 10, "up_gather", status, [&] { same(c.out, c.ref, g, exact); });
        if (!exact) run(v, 11, "up_gather", status, [&] { same(c.out2, c.ref_h, s.f, false); });
      });
    }
    if (o.kernel("down")) {
      if (s.rows) ref_rows<<<grid(size_t(s.rows) * s.d), 128>>>(c.h_in, c.down, c.off, s.e, s.rows, s.d, s.f, false, bf16, c.ref, c.miss);
      wait_or_die("reference down");
      each([&](int v) {
        nan(c.out, size_t(s.rows) * s.d);
        Status status = vs[v].down({c.h_in, c.down, c.off, c.out, shape}, nullptr);
        run(v, 3, "down", status, [&] { same(c.out, c.ref, s.d, exact); });
      });
    }
    if (o.kernel("down_backward")) {
      bool any = false;
      each([&](int v) { any |= vs[v].down_backward != nullptr; });
      if (any && s.rows) {
        ref_rows<<<grid(size_t(s.rows) * s.f), 128>>>(c.dy, c.down, c.off, s.e, s.rows, s.f, s.d, true, bf16, c.ref, c.miss);
        ref_act_backward<<<grid(s.rows), 128>>>(c.ref, c.hidden_in, s.rows, s.f, gated, weights, c.perm, bf16, c.ref2, c.ref_h, c.ref_dw);
        wait_or_die("reference down_backward");
      }
      each([&](int v) {
        if (!vs[v].down_backward) return;
        nan(c.out, size_t(s.rows) * g); nan(c.out2, size_t(s.rows) * s.f);
        CK(cudaMemset(c.grad_weights, 0xff, c.kMaxRows * 4)); CK(cudaMemset(c.workspace, 0xff, c.kMaxRows * 64 * 4));
        FfnDownBackwardParams p{c.dy, c.down, c.hidden_in, c.off, {weights, c.perm}, c.out, c.out2, weights ? c.grad_weights : nullptr, weights ? c.workspace : nullptr, shape};
        Status status = vs[v].down_backward(p, nullptr);
        run(v, 4, "down_backward", status, [&] { same(c.out, c.ref2, g, false); });
        run(v, 5, "down_backward", status, [&] { same(c.out2, c.ref_h, s.f, false); });
        if (weights && s.rows) {
          std::vector<float> dw(s.rows); std::vector<double> ref(s.rows);
          wait_or_die("down_backward");
          CK(cudaMemcpy(dw.data(), c.grad_weights, s.rows * 4, cudaMemcpyDeviceToHost));
          CK(cudaMemcpy(ref.data(), c.ref_dw, s.rows * 8, cudaMemcpyDeviceToHost));
          Tally& t = tally[v][6];
          ++t.cases;
          float ratio = 0;
          for (int n = 0; n < s.rows; ++n) {
            const double r = n < live ? ref[n] : 0, e = std::fabs(dw[perm[n]] - r) / (1e-4 * ((exact ? 500 : 1) + std::fabs(r)));
            const float x = n < live ? float(e) : (dw[perm[n]] == 0 ? 0 : 1e9f);
            ratio = std::max(ratio, x == x ? x : 3e38f);
          }
          t.worst = std::max(t.worst, ratio);
          if (ratio > 1) { ++t.bad; all_ok = false; printf("FAIL %s dw: worst ratio %g\n", what, ratio); }
        }
      });
    }
    if (o.kernel("up_backward")) {
      if (s.rows) ref_rows<<<grid(size_t(s.rows) * s.d), 128>>>(c.dhidden_in, c.up, c.off, s.e, s.rows, s.d, g, true, bf16, c.ref, c.miss);
      wait_or_die("reference up_backward");
      each([&](int v) {
        nan(c.out, size_t(s.rows) * s.d);
        Status status = vs[v].up_backward({c.dhidden_in, c.up, c.off, c.out, shape}, nullptr);
        run(v, 7, "up_backward", status, [&] { same(c.out, c.ref, s.d, exact && g <= 512); });
      });
    }
    if (o.kernel("weight")) {
      for (int which = 0; which < 2; ++which) {
        const u16 *grad = which == 0 ? c.dhidden_in : c.dy, *in = which == 0 ? c.rows : c.h_in;
        const int outs = which == 0 ? g : s.d, ins = which == 0 ? s.d : s.f;
        const size_t n = size_t(s.e) * outs * ins;
        ref_weight<<<grid(n), 128>>>(grad, in, c.off, s.e, outs, ins, bf16, c.ref, c.miss);
        wait_or_die("reference weight");
        each([&](int v) {
          nan(c.out, n);
          Status status = vs[v].weight({grad, in, c.off, c.out, s.rows, outs, ins, s.e, shape.dtype}, nullptr);
          run(v, 8 + which, "weight", status, [&] { compare16<<<256, 256>>>(c.out, c.ref, c.miss, n, bf16, exact, c.worst); });
        });
      }
    }
  }
  for (size_t v = 0; v < vs.size(); ++v) {
    if (!o.variant(vs[v].name)) continue;
    for (size_t i = 0; i < names.size(); ++i) {
      const Tally& t = tally[v][i];
      if (t.cases + t.bad) printf("%s %-18s %-8s %ld cases, %ld bad, worst error / allowed %.3f\n", t.bad ? "FAIL" : "PASS", names[i].c_str(), vs[v].name, t.cases, t.bad, t.worst);
    }
  }
  printf("%s\n", all_ok ? "ALL PASS" : "SOME FAIL");
  return all_ok ? 0 : 4;
}
