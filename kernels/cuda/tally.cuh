// Counts over the blocks of one launch, with no launch before it to clear them.
//
// A cell adds up one arrival and one number from every block, in one 64 bit atomic. The block that makes the
// arrivals complete has the total: it writes the result and puts the cell back to zero, for the launch after it.
// Cells outlive launches, so no two launches that may run at the same time can share them: a row of cells belongs
// to a stream, or to a stream within one graph capture (a graph never runs twice at the same time).
#pragma once

#include <mutex>

#include "launch.cuh"

namespace moe::cuda {

constexpr int kTallies = 128;  // streams and captures a device can have; after that counts are cleared by a launch

template <int kCells>
struct Tally {
  unsigned long long cells[kTallies][kCells];  // zero when no launch is running

  // Adds this block's number to a cell; true in the last of `blocks` blocks, with the total.
  __device__ bool add(int row, int cell, uint32_t number, uint32_t blocks, int32_t* total) {
    constexpr unsigned long long kArrival = 1ull << 32;
    unsigned long long* const at = &cells[row][cell];
    const unsigned long long sum = atomicAdd(at, kArrival + number) + kArrival + number;
    if (sum >> 32 != blocks) return false;
    *at = 0;
    *total = int32_t(uint32_t(sum));
    return true;
  }
};

// The row of cells for launches on a stream of the current device, as it is being used now; -1 when none is left.
class TallyRows {
 public:
  int row_of(cudaStream_t stream) {
    Key key{stream, 0};
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return -1;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (cudaStreamGetCaptureInfo(stream, &status, &key.capture) != cudaSuccess) {
      cudaGetLastError();  // the launch itself will say it
      return -1;
    }
    if (status == cudaStreamCaptureStatusNone) key.capture = 0;
    const std::lock_guard<std::mutex> lock(mutex_);
    Owners& owners = owners_[device];
    for (int row = owners.count - 1; row >= 0; --row) {
      if (owners.keys[row].stream == key.stream && owners.keys[row].capture == key.capture) return row;
    }
    if (owners.count == kTallies) return -1;
    owners.keys[owners.count] = key;
    return owners.count++;
  }

 private:
  struct Key {
    cudaStream_t stream;
    unsigned long long capture;  // 0 when the stream is not being captured
  };
  struct Owners {
    Key keys[kTallies];
    int count;
  };
  std::mutex mutex_;
  Owners owners_[kMaxDevices] = {};
};

}  // namespace moe::cuda
