#include "product.h"
using namespace moe; using namespace moe::cuda;
using u16 = uint16_t;
namespace moe::cuda::ffn {
Status add_dots(const DotParams& p, Stream) {
  for (int r = 0; r < p.rows; ++r) {
    float s = 0;
    if (r < *p.kept_rows) for (int n = 0; n < p.parts; ++n) s += p.dots[int64_t(n) * p.rows + r];
    p.grad_weights[p.slot_of_row[r]] = s;
  }
  return {};
}
}
template <class Format, class V> void test(bool gated, int rows, int d, int f, std::vector<int> count, bool late) {
  late_copies = late;
  const bool bf16 = std::is_same_v<Format, Bf16>;
  const int e = int(count.size()), g = gated ? 2 * f : f;
  std::mt19937 rng(rows + d);
  std::vector<int> off(e + 1, 0), perm(rows);
  for (int i = 0; i < e; ++i) off[i + 1] = off[i] + count[i];
  const int live = off[e];
  assert(live <= rows);
  for (int i = 0; i < rows; ++i) perm[i] = i;
  std::shuffle(perm.begin(), perm.end(), rng);
  std::vector<float> w(rows);
  for (auto& x : w) x = 0.1f + float(rng() % 100) / 100;
  const auto make = [&](size_t n, float scale, size_t good) {
    u16* p = (u16*)aligned_alloc(16, (n * 2 + 63) / 16 * 16);
    for (size_t i = 0; i < n; ++i) p[i] = i < good ? u16(Format::from_real(scale * (float(rng() % 2001) / 1000 - 1))) : 0xffff;
    ranges.push_back({(const char*)p, (const char*)(p + n)});
    return p;
  };
  const auto nans = [&](size_t n) { return make(n, 1, 0); };
  u16 *x = make(size_t(rows) * d, 1, size_t(live) * d), *up = make(size_t(e) * g * d, 0.3f, size_t(e) * g * d), *down = make(size_t(e) * d * f, 0.3f, size_t(e) * d * f);
  u16 *hin = make(size_t(rows) * f, 1, size_t(live) * f), *hid = make(size_t(rows) * g, 2, size_t(live) * g), *dy = make(size_t(rows) * d, 1, size_t(live) * d), *dhid = make(size_t(rows) * g, 1, size_t(live) * g);
  u16 *o_hidden = nans(size_t(rows) * g), *o_h = nans(size_t(rows) * f), *o_y = nans(size_t(rows) * d), *o_dhid = nans(size_t(rows) * g), *o_h2 = nans(size_t(rows) * f), *o_dx = nans(size_t(rows) * d), *o_dup = nans(size_t(e) * g * d), *o_ddown = nans(size_t(e) * d * f);
  std::vector<float> dw(rows, NAN), workspace(size_t((f + 63) / 64) * rows, NAN);
  const FfnShape s{rows, d, f, e, gated ? Activation::kSwiglu : Activation::kGelu, bf16 ? DType::kBf16 : DType::kFp16};
  const auto ok = [](Status st) { if (!st.ok()) { printf("status %s\n", rule(st.code)); exit(1); } };
  ok(sm80::up<V>({x, up, off.data(), {w.data(), perm.data()}, o_hidden, o_h, s}, nullptr));
  ok(sm80::down<V>({hin, down, off.data(), o_y, s}, nullptr));
  ok(sm80::down_backward<V>({dy, down, hid, off.data(), {w.data(), perm.data()}, o_dhid, o_h2, dw.data(), workspace.data(), s}, nullptr));
  ok(sm80::up_backward<V>({dhid, up, off.data(), o_dx, s}, nullptr));
  ok(sm80::weight_backward<V>({dhid, x, off.data(), o_dup, rows, g, d, e, s.dtype}, nullptr));
  ok(sm80::weight_backward<V>({dy, hin, off.data(), o_ddown, rows, d, f, e, s.dtype}, nullptr));
  const auto real = [](u16 b) { return double(Format::to_real(int16_t(b))); };
  int bad = 0;
  const auto close = [&](const char* what, u16 got, double ref, int r, int c) {
    const double err = std::fabs(real(got) - ref);
    if (!(err <= (bf16 ? 0x1p-8 : 0x1p-11) * 1.05 * std::fabs(ref) + 2e-5) && ++bad < 10) printf("BAD %s (%d, %d): %g, should be %g\n", what, r, c, real(got), ref);
  };
  const auto sig = [](double v) { return 1 / (1 + std::exp(-v)); };
  const auto phi = [](double v) { return 0.5 * std::erfc(-v * std::sqrt(0.5)); };
  for (int ex = 0; ex < e; ++ex) {
    for (int r = off[ex]; r < off[ex + 1]; ++r) {
      std::vector<double> hidden(g);
      const double ww = w[perm[r]];
      for (int c = 0; c < g; ++c) { double t = 0; for (int i = 0; i < d; ++i) t += real(x[size_t(r) * d + i]) * real(up[(size_t(ex) * g + c) * d + i]); hidden[c] = t; close("hidden", o_hidden[size_t(r) * g + c], t, r, c); }
      double dot = 0;
      for (int c = 0; c < f; ++c) {
        const double a = hidden[c];
        close("h", o_h[size_t(r) * f + c], ww * (gated ? a * sig(a) * hidden[f + c] : a * phi(a)), r, c);
        double t = 0;
        for (int i = 0; i < d; ++i) t += real(dy[size_t(r) * d + i]) * real(down[(size_t(ex) * d + i) * f + c]);
        const double b = real(hid[size_t(r) * g + c]), u = gated ? real(hid[size_t(r) * g + f + c]) : 0, v = gated ? b * sig(b) * u : b * phi(b);
        if (gated) {
          close("dgate", o_dhid[size_t(r) * g + c], ww * t * u * (sig(b) + b * sig(b) * (1 - sig(b))), r, c);
          close("dup", o_dhid[size_t(r) * g + f + c], ww * t * b * sig(b), r, c);
        } else close("dhidden", o_dhid[size_t(r) * g + c], ww * t * (phi(b) + b * 0.3989422804014327 * std::exp(-0.5 * b * b)), r, c);
        close("h anew", o_h2[size_t(r) * f + c], ww * v, r, c);
        dot += t * v;
      }
      if (!(std::fabs(dw[perm[r]] - dot) < 1e-4 * (1 + std::fabs(dot))) && ++bad < 10) printf("BAD dw %d: %g %g\n", r, dw[perm[r]], dot);
      for (int c = 0; c < d; ++c) {
        double t = 0, t2 = 0;
        for (int i = 0; i < f; ++i) t += real(hin[size_t(r) * f + i]) * real(down[(size_t(ex) * d + c) * f + i]);
        for (int i = 0; i < g; ++i) t2 += real(dhid[size_t(r) * g + i]) * real(up[(size_t(ex) * g + i) * d + c]);
        close("y", o_y[size_t(r) * d + c], t, r, c);
        close("dx", o_dx[size_t(r) * d + c], t2, r, c);
      }
    }
    for (int o = 0; o < g; ++o) for (int i = 0; i < d; ++i) { double t = 0; for (int r = off[ex]; r < off[ex + 1]; ++r) t += real(dhid[size_t(r) * g + o]) * real(x[size_t(r) * d + i]); close("dW up", o_dup[(size_t(ex) * g + o) * d + i], t, o, i); }
    for (int o = 0; o < d; ++o) for (int i = 0; i < f; ++i) { double t = 0; for (int r = off[ex]; r < off[ex + 1]; ++r) t += real(dy[size_t(r) * d + o]) * real(hin[size_t(r) * f + i]); close("dW down", o_ddown[(size_t(ex) * d + o) * f + i], t, o, i); }
  }
  for (int r = live; r < rows; ++r) {
    const auto untouched = [&](const char* what, const u16* p, int width) { for (int c = 0; c < width; ++c) if (p[size_t(r) * width + c] != 0xffff && ++bad < 10) printf("BAD %s: row %d of a dropped slot was written\n", what, r); };
    untouched("hidden", o_hidden, g); untouched("h", o_h, f); untouched("y", o_y, d); untouched("dhid", o_dhid, g); untouched("h2", o_h2, f); untouched("dx", o_dx, d);
    if (dw[perm[r]] != 0 && ++bad < 10) printf("BAD dw of a dropped slot: %g\n", dw[perm[r]]);
  }
  printf("%s %s %s rows %d D %d F %d E %d warps_n %d %s\n", bad ? "FAIL" : "PASS", bf16 ? "bf16" : "fp16", gated ? "swiglu" : "gelu", rows, d, f, e, V::kWarpsN, late ? "late" : "early");
  fflush(stdout);
  if (bad) exit(1);
}
template <class V> void all() {
  for (bool late : {false, true}) {
    test<Bf16, V>(true, 300, 72, 136, {150, 0, 7, 100}, late);
    test<Fp16, V>(false, 150, 168, 264, {0, 129, 10}, late);
    test<Bf16, V>(false, 20, 8, 8, {3, 17, 0}, late);
    test<Fp16, V>(true, 66, 200, 40, {1, 65}, late);
  }
}
int main(int argc, char**) { if (argc > 1) { for (bool late : {false, true}) { test<Bf16, sm80::Variant<4, 4, 1>>(true, 66, 200, 40, {1, 65}, late); test<Bf16, sm80::Variant<4, 4, 1>>(false, 20, 8, 8, {3, 17, 0}, late); } return 0; } all<sm80::Variant<4, 4, 1>>(); all<sm80::Variant<2, 4, 2>>();  }
