#pragma once
#include <ucontext.h>
#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <type_traits>
#include <vector>
#include "dtype.h"
#include "status.h"
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
using std::min; using std::max;
struct Dim { unsigned x; };
inline Dim threadIdx, blockIdx, gridDim;
struct uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
template <class T> T __ldg(const T* p) { return *p; }
inline int __ffs(int x) { return __builtin_ffs(x); }
alignas(128) inline char emu_shared[256 * 1024];
inline size_t __cvta_generic_to_shared(const void* p) { return size_t((const char*)p - emu_shared); }

// fibers
struct Copy { uint32_t to; const void* from; bool inside; };
struct Fiber { ucontext_t context; std::vector<char> stack; bool done; std::deque<std::vector<Copy>> groups; std::vector<Copy> open; };
struct Meeting { int arrived = 0; long round = 0; };
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current, threads_of_block;
inline Meeting block_meeting, warp_meeting[32];
inline bool late_copies;
inline std::mt19937 emu_rng(3);
inline uint64_t warp_in[32][32][16], warp_out[32][32][8];
inline void yield() { int me = current; swapcontext(&fibers[me].context, &scheduler); }
template <class Last> void meet(Meeting& m, int count, const Last& last) {
  const long round = m.round;
  if (++m.arrived == count) { last(); m.arrived = 0; ++m.round; return; }
  while (m.round == round) yield();
}
inline void __syncthreads() { meet(block_meeting, threads_of_block, [] {}); }
// one warp collective: every lane gives words, compute sees all
template <int kIn, int kOut, class Compute> void collective(const uint64_t (&in)[kIn], uint64_t (&out)[kOut], const Compute& compute) {
  const int warp = current / 32, lane = current % 32;
  for (int i = 0; i < kIn; ++i) warp_in[warp][lane][i] = in[i];
  meet(warp_meeting[warp], 32, [&] { compute(warp_in[warp], warp_out[warp]); });
  for (int i = 0; i < kOut; ++i) out[i] = warp_out[warp][lane][i];
  uint64_t none[1] = {};
  (void)none;
  meet(warp_meeting[warp], 32, [] {});
}
template <class T> T shuffle(T v, const std::function<int(int)>& source) {
  uint64_t in[1] = {}, out[1];
  memcpy(in, &v, sizeof v);
  collective(in, out, [&](auto& i, auto& o) { for (int l = 0; l < 32; ++l) { int s = source(l); o[l][0] = i[s < 0 ? l : s][0]; } });
  T r; memcpy(&r, out, sizeof r); return r;
}
// the last lane to arrive evaluates `source` for all: a constant source lane is what the code uses
template <class T> T __shfl_sync(unsigned, T v, int lane) {
  uint64_t in[2] = {0, uint64_t(lane)}, out[1];
  memcpy(in, &v, sizeof v);
  collective(in, out, [&](auto& i, auto& o) { for (int l = 0; l < 32; ++l) o[l][0] = i[i[l][1] % 32][0]; });
  T r; memcpy(&r, out, sizeof r); return r;
}
inline unsigned __ballot_sync(unsigned, bool b);
inline bool __any_sync(unsigned m, bool b) { return __ballot_sync(m, b) != 0; }
template <class T> T __shfl_up_sync(unsigned, T v, int step) { return shuffle<T>(v, [=](int l) { return l - step; }); }
template <class T> T __shfl_xor_sync(unsigned, T v, int bit) { return shuffle<T>(v, [=](int l) { return l ^ bit; }); }
inline unsigned __ballot_sync(unsigned, bool b) {
  uint64_t in[1] = {b}, out[1];
  collective(in, out, [](auto& i, auto& o) { uint64_t m = 0; for (int l = 0; l < 32; ++l) m |= i[l][0] << l; for (int l = 0; l < 32; ++l) o[l][0] = m; });
  return unsigned(out[0]);
}
inline std::vector<std::pair<const char*, const char*>> ranges;
inline void perform(const Copy& c) {
  { bool in = false; for (auto& r : ranges) in |= (const char*)c.from >= r.first && (const char*)c.from + 16 <= r.second; if (!in) { printf("OUT OF BOUNDS\n"); exit(1); } }
  if (c.inside) memcpy(emu_shared + c.to, c.from, 16); else memset(emu_shared + c.to, 0, 16);
}
inline void emu_copy(uint32_t to, const void* from, bool inside) {
  assert(to % 16 == 0 && uintptr_t(from) % 16 == 0);
  Copy c{to, from, inside};
  if (late_copies) fibers[current].open.push_back(c); else perform(c);
}
inline void emu_commit() { fibers[current].groups.push_back(std::move(fibers[current].open)); fibers[current].open.clear(); }
inline void emu_wait(int behind) {
  auto& g = fibers[current].groups;
  while (int(g.size()) > behind) { for (auto& c : g.front()) perform(c); g.pop_front(); }
}
inline void emu_ldmatrix(uint32_t (&w)[4], uint32_t address, bool trans) {
  assert(address % 16 == 0);
  uint64_t in[1] = {address}, out[4];
  collective(in, out, [=](auto& i, auto& o) {
    for (int l = 0; l < 32; ++l) for (int m = 0; m < 4; ++m) {
      uint16_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int row = trans ? l % 4 * 2 + j : l / 4, col = trans ? l / 4 : l % 4 * 2 + j;
        memcpy(&pair[j], emu_shared + i[m * 8 + row][0] + col * 2, 2);
      }
      o[l][m] = pair[0] | uint32_t(pair[1]) << 16;
    }
    for (int m = 0; m < 4; ++m) {  // bank conflicts
      int used = 0;
      for (int r = 0; r < 8; ++r) used |= 1 << (i[m * 8 + r][0] / 16 % 8);
      if (used != 255) { printf("BANK CONFLICT %x\n", used); exit(1); }
    }
  });
  for (int m = 0; m < 4; ++m) w[m] = uint32_t(out[m]);
}
template <class Format> void emu_multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t* b) {
  uint64_t in[10], out[4];
  for (int i = 0; i < 4; ++i) { in[i] = a[i]; in[6 + i] = moe::bit_cast<uint32_t>(sums[i]); }
  in[4] = b[0]; in[5] = b[1];
  collective(in, out, [](auto& i, auto& o) {
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; ++l) {
      for (int r = 0; r < 4; ++r) for (int j = 0; j < 2; ++j)
        A[l / 4 + r % 2 * 8][l % 4 * 2 + j + r / 2 * 8] = Format::to_real(int16_t(i[l][r] >> (16 * j) & 0xffff));
      for (int r = 0; r < 2; ++r) for (int j = 0; j < 2; ++j)
        B[l % 4 * 2 + j + 8 * r][l / 4] = Format::to_real(int16_t(i[l][4 + r] >> (16 * j) & 0xffff));
    }
    for (int l = 0; l < 32; ++l) for (int c = 0; c < 4; ++c) {
      const int row = l / 4 + c / 2 * 8, col = l % 4 * 2 + c % 2;
      float s = moe::bit_cast<float>(uint32_t(i[l][6 + c]));
      for (int k = 0; k < 16; ++k) s += A[row][k] * B[k][col];
      o[l][c] = moe::bit_cast<uint32_t>(s);
    }
  });
  for (int i = 0; i < 4; ++i) sums[i] = moe::bit_cast<float>(uint32_t(out[i]));
}
inline std::function<void()> fiber_body;
inline void fiber_main() { fiber_body(); fibers[current].done = true; while (true) yield(); }
inline void emu_run(int blocks, int threads, const std::function<void()>& body) {
  gridDim.x = blocks; threads_of_block = threads; fiber_body = body;
  for (int b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    memset(emu_shared, 0xff, sizeof emu_shared);
    if (int(fibers.size()) < threads) fibers.resize(threads);
    block_meeting = {}; for (auto& w : warp_meeting) w = {};
    for (int t = 0; t < threads; ++t) {
      Fiber& f = fibers[t];
      f.stack.resize(64 * 1024); f.done = false; f.groups.clear(); f.open.clear();
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data(); f.context.uc_stack.ss_size = f.stack.size(); f.context.uc_link = nullptr;
      makecontext(&f.context, fiber_main, 0);
    }
    bool all = false;
    long idle = 0;
    while (!all) {  // warps in random order, some of them far ahead of others
      all = true;
      for (int w = 0; w < threads / 32; ++w) {
        const int warp = emu_rng() % (threads / 32), turns = 1 + emu_rng() % 300;
        for (int turn = 0; turn < turns; ++turn) for (int l = 0; l < 32; ++l) {
          const int t = warp * 32 + l;
          if (fibers[t].done) continue;
          current = t; threadIdx.x = t;
          swapcontext(&scheduler, &fibers[t].context);
        }
      }
      for (int t = 0; t < threads; ++t) all &= fibers[t].done;
      if (++idle > 4000000) { printf("HANG\n"); exit(1); }
    }
  }
}
