// The gradient of the hidden rows, where hidden comes in as more blocks after those of the contraction: through the
// same stages, in which it is turned into gradients and from which they leave. No other memory waits for the epilogue,
// so there is room for more stages, or for a third warpgroup.
#pragma once

#include "ffn_sm90_down_backward.cuh"

namespace moe::cuda::sm90 {

// 64 columns of a tile's part of hidden are a block: each warpgroup's gates lie where its A is, its ups among B.
template <int kSlots>
struct Staged {
  static constexpr int kLoads = 0, kBlocks = kTileN / kBox;
  static_assert(kSlots >= 2, "a slot fills while the last one leaves");

  template <class Storage>
  __device__ Staged(Storage& storage, int group)
      : slots(uint32_t(__cvta_generic_to_shared(storage.slots[group]))) {}
  __device__ void flush() const {}  // a tile does not end before its results have left

  const uint32_t slots;  // of h
};

template <class Format, class Act>
class DownBackwardStaged : public DownBackwardOut<Format, Act> {
  using Base = DownBackwardOut<Format, Act>;

 public:
  using typename Base::Params;
  using Base::Base, Base::kChunks, Base::kParts;
  template <int kSlots>
  using Exchange = Staged<kSlots>;

  // The thread that loads, into a stage that is free; `boxes` of the tile have rows.
  template <class Storage>
  static __device__ __forceinline__ void load(const Params& p, Storage& storage, const Tile& tile, int c, int stage,
                                              int boxes) {
    storage.full[stage].arrive_and_expect_tx(boxes * kParts * kBoxBytes);
#pragma unroll 1
    for (int box = 0; box < boxes; ++box) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        load_box<false>(p.hidden, storage.full[stage], part_of(storage, stage, box, part),
                        rows_at(tile.n * kTileN + c * kBox, part, tile.row + box * kBox,
                                min(tile.rows - box * kBox, kBox)));
      }
    }
  }

  // All threads of the warpgroup. `release(stage)` frees a stage.
  template <class Exchange, class Storage, class Turn, class Release>
  __device__ __forceinline__ void store(const float (&sums)[kSums], const Exchange& exchange, Storage& storage,
                                        Turn& turn, const Release& release) const {
    const bool leads = threadIdx.x % kGroupThreads == 0;
    float dots[2] = {};
    int last = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint32_t h = exchange.slots + c % 2 * kBoxBytes;
      storage.full[turn.stage].wait(turn.phase);
      uint32_t at[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        at[part] = uint32_t(__cvta_generic_to_shared(part_of(storage, turn.stage, this->at_.group, part)));
      }
      change(sums, c, at, h, dots);
      cute::tma_store_fence();
      if (leads) cute::tma_store_wait<0>();  // the chunk before this one has left
      sync_group(this->at_.group);
      if (c > 0) release(last);
      if (leads) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) store_box(this->p_.grad_hidden, at[part], this->hidden_at(c, part));
        store_box(this->p_.h, h, this->hidden_at(c, 0));
        cute::tma_store_arrive();
      }
      last = turn.stage;
      turn.advance();
    }
    if (leads) cute::tma_store_wait<0>();
    sync_group(this->at_.group);
    release(last);
    if (this->p_.dots != nullptr && this->column(0) < this->p_.width) this->store_dots(dots);
  }

 private:
  template <class Storage>
  static __device__ char* part_of(Storage& storage, int stage, int box, int part) {
    return part == 0 ? storage.a[stage][box] : storage.b[stage][box];
  }

  // 16 columns at a time: the sums of the tile hold most registers.
  __device__ __forceinline__ void change(const float (&sums)[kSums], int c, const uint32_t (&at)[kParts], uint32_t h,
                                         float (&dots)[2]) const {
    const int warp = this->at_.warp, lane = this->at_.lane;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      uint32_t words[kParts][4], results[4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) read_words(at[part], warp, lane, p, words[part]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t of_parts[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part) of_parts[part] = words[part][i];
        results[i] = ffn::through_activation<Format, Act>(of_parts, sums + 32 * c + 2 * (4 * p + i),
                                                     i % 2 == 0 ? this->weights_.low : this->weights_.high,
                                                     dots[i % 2]);
#pragma unroll
        for (int part = 0; part < kParts; ++part) words[part][i] = of_parts[part];
      }
      __syncwarp();  // a warp writes only where it has read
#pragma unroll
      for (int part = 0; part < kParts; ++part) write_words(at[part], warp, lane, p, words[part]);
      write_words(h, warp, lane, p, results);
    }
  }
};

}  // namespace moe::cuda::sm90
