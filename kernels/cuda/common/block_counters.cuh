// Counters over the blocks of one launch that need no clearing launch: self-resetting, by the last block.
//
// A counter accumulates one arrival and one number from every block, in one atomic. The block that completes the arrivals
// has the total: it writes the result and resets the counter for the next launch. Counters outlive launches, so launches
// that may run concurrently cannot share them: a slot of counters belongs to a stream, or to a stream within one graph
// capture (a graph never runs twice at the same time).
#pragma once

#include <atomic>
#include <mutex>

#include "common/launch.cuh"

namespace moe::cuda {

constexpr int kCounterSlots = 128;  // streams and graphs at a time on a device; beyond, counts are cleared by a launch
constexpr int kArrivalBits = 8;
constexpr unsigned kMaxCounterBlocks = (1 << kArrivalBits) - 1;            // most blocks of a launch
constexpr int64_t kMaxCount = (1ll << (32 - kArrivalBits)) - 1;     // most that a counter can count

template <int kCounters>
class LastBlockCounter {
 public:
  // Adds this block's number to a counter; the last of `blocks` blocks writes the total.
  __device__ void add(int slot, int counter, uint32_t number, unsigned blocks, int32_t* total) {
    constexpr uint32_t kArrival = 1u << (32 - kArrivalBits);
    uint32_t* const at = &counters_[slot][counter / kSector][counter % kSector];
    const uint32_t sum = atomicAdd(at, kArrival + number) + kArrival + number;
    if (sum / kArrival != blocks) return;
    *at = 0;
    *total = int32_t(sum % kArrival);
  }

 private:
  // Counters of a 32 byte sector share an atomic transaction; sectors are spread over the slices of L2.
  static constexpr int kSector = 8;
  static constexpr int kSectorStride = 64;
  uint32_t counters_[kCounterSlots][(kCounters + kSector - 1) / kSector][kSectorStride];  // zero when no launch is running
};

// Allocates slots of counters. A stream keeps its slot; a graph releases it when it is destroyed.
class CounterSlotAllocator {
 public:
  // The slot for a launch on a stream of the current device, captured or not; -1 when none is left.
  int slot_for(cudaStream_t stream) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return -1;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    cudaGraph_t graph = nullptr;
    if (capture_info(stream, &status, &capture, &graph) != cudaSuccess) {
      cudaGetLastError();  // the launch itself will report it
      return -1;
    }
    const bool captured = status == cudaStreamCaptureStatusActive;
    if (!captured) capture = 0;
    const std::lock_guard<std::mutex> lock(mutex_);
    Owner* const owners = owners_[device];
    int unused = -1;
    for (int slot = 0; slot < kCounterSlots; ++slot) {
      const State state = owners[slot].state.load();
      if (state == State::kUsed && owners[slot].stream == stream && owners[slot].capture == capture) return slot;
      if (state == State::kFree && unused < 0) unused = slot;
      if (state == State::kNever) {  // and so are all after it
        if (unused < 0) unused = slot;
        break;
      }
    }
    if (unused < 0 || (captured && !release_with(graph, &owners[unused]))) return -1;
    owners[unused].stream = stream;
    owners[unused].capture = capture;
    owners[unused].state = State::kUsed;
    return unused;
  }

 private:
  enum class State { kNever, kUsed, kFree };
  struct Owner {
    std::atomic<State> state{State::kNever};
    cudaStream_t stream = nullptr;
    unsigned long long capture = 0;  // 0 when the stream is not being captured
  };

  static cudaError_t capture_info(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                  cudaGraph_t* graph) {
#if CUDART_VERSION >= 13000
    return cudaStreamGetCaptureInfo(stream, status, id, graph, nullptr, nullptr, nullptr);
#else
    return cudaStreamGetCaptureInfo(stream, status, id, graph, nullptr, nullptr);
#endif
  }

  // The slot is free again when the graph, and everything instantiated from it, is gone.
  static bool release_with(cudaGraph_t graph, Owner* owner) {
    cudaUserObject_t object = nullptr;
    const auto free = [](void* owner) { static_cast<Owner*>(owner)->state = State::kFree; };
    bool retained = cudaUserObjectCreate(&object, owner, free, 1, cudaUserObjectNoDestructorSync) == cudaSuccess;
    retained = retained && cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove) == cudaSuccess;
    if (!retained) cudaGetLastError();
    return retained;
  }

  std::mutex mutex_;
  Owner owners_[kMaxDevices][kCounterSlots];
};

}  // namespace moe::cuda
