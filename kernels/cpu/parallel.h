// parallel_for: split [0, n) into contiguous ranges, one per thread, and wait for all of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>

namespace moe::cpu {

constexpr int kMaxThreads = 64;

// run(begin, end) must not throw. Ranges hold at least `grain` items, so that small work stays on the caller.
template <class Run>
void parallel_for(int64_t n, int64_t grain, int threads, const Run& run) {
  const int64_t wanted = std::min<int64_t>({threads, kMaxThreads, n / std::max<int64_t>(grain, 1)});
  if (wanted <= 1) return run(int64_t{0}, n);
  std::thread workers[kMaxThreads];
  int started = 1;
  int64_t begin = n / wanted;  // [0, begin) is the caller's own
  try {
    for (; started < wanted; ++started) {
      const int64_t end = n * (started + 1) / wanted;
      workers[started] = std::thread(run, begin, end);
      begin = end;
    }
  } catch (const std::system_error&) {
    run(begin, n);  // no thread to be had: do the rest here
  }
  run(int64_t{0}, n / wanted);
  for (int i = 1; i < started; ++i) workers[i].join();
}

}  // namespace moe::cpu
