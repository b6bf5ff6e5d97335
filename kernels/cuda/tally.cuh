// Counts over the blocks of one launch, with no launch before it to clear them.
//
// A cell adds up one arrival and one number from every block, in one atomic. The block that makes the arrivals complete
// has the total: it writes the result and puts the cell back to zero, for the launch after it. Cells outlive launches,
// so no two launches that may run at the same time can share them: a row of cells belongs to a stream, or to a stream
// within one graph capture (a graph never runs twice at the same time).
#pragma once

#include <mutex>

#include "launch.cuh"

namespace moe::cuda {

constexpr int kTallies = 64;  // streams and captures a device can have; after that counts are cleared by a launch
constexpr int kArrivalBits = 8;
constexpr unsigned kTallyBlocks = (1 << kArrivalBits) - 1;            // most blocks of a launch
constexpr int64_t kTallyTotal = (1ll << (32 - kArrivalBits)) - 1;     // most that a cell can count

template <int kCells>
class Tally {
 public:
  // Adds this block's number to a cell; in the last of `blocks` blocks writes the total.
  __device__ void add(int row, int cell, uint32_t number, unsigned blocks, int32_t* total) {
    constexpr uint32_t kArrival = 1u << (32 - kArrivalBits);
    uint32_t* const at = &cells_[row][cell / kSector][cell % kSector];
    const uint32_t sum = atomicAdd(at, kArrival + number) + kArrival + number;
    if (sum / kArrival != blocks) return;
    *at = 0;
    *total = int32_t(sum % kArrival);
  }

 private:
  // Cells of a 32 byte sector are added to at once; sectors lie apart so that many parts of the cache work at a time.
  static constexpr int kSector = 8;
  static constexpr int kApart = 64;
  uint32_t cells_[kTallies][(kCells + kSector - 1) / kSector][kApart];  // zero when no launch is running
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
