// The logits of one row as sortable keys: a sub-warp of kLanes lanes shares the row, with kPerLane logits per lane.
// `extract_max` gives all lanes the largest key not extracted yet. Order: logit descending, then expert id ascending; -0
// equals +0.
//
// NaN sorts above +inf, so that the first winner shows whether a row holds one. Such a row is set again with
// `nan_as_lowest`, NaN as -inf: the order of the router contract.
#pragma once

#include <type_traits>

#include "common/subwarp.cuh"
#include "select.h"

namespace moe::cuda {

// Chunks of kChunk logits, the widest load there is, alternate between lanes.
template <class Format, int kLanes, int kPerLane>
struct RowLayout {
  static constexpr int kWidest = 16 / int(sizeof(typename Format::Bits));
  static constexpr int kChunk = kPerLane < kWidest ? kPerLane : kWidest;
  static constexpr int kChunks = kPerLane / kChunk;
  int lane;
  __device__ int first_id(int chunk) const { return (chunk * kLanes + lane) * kChunk; }
  __device__ int id_at(int v) const { return first_id(v / kChunk) + v % kChunk; }  // increases with v
};

// 32 and 64 bit keys: key and id are compared separately.
template <class Format, int kLanes, int kPerLane>
class WideKeys {
 public:
  using Key = typename Format::Bits;
  using Word = Key;  // unit in which a row is loaded
  static constexpr int kPerWord = 1;
  struct KeyIndex {
    Key key;
    int id;
  };
  static constexpr Key kMagnitude = std::numeric_limits<Key>::max();
  static constexpr Key kNone = std::numeric_limits<Key>::min();
  static constexpr Key kPlusInf = Format::kInf;
  static constexpr Key kMinusInf = Key(~Format::kInf);  // of a negative number all bits but the sign are inverted

  using LaneIds = RowLayout<Format, kLanes, kPerLane>;

  static __device__ Key key_of(KeyIndex packed) { return packed.key; }
  static __device__ int id_of(KeyIndex packed) { return packed.id; }
  static __device__ typename Format::Real value_of(KeyIndex packed) {
    return Format::to_real(packed.key < 0 ? Key(packed.key ^ kMagnitude) : packed.key);
  }

  __device__ void clear(int v) { keys_[v] = kNone; }
  __device__ void set(int v, Key bits, const LaneIds&, bool nan_as_lowest) {
    // Adding zero turns -0 into +0, and a 32 bit NaN into the positive one; 64 bit NaNs keep their signs.
    Key plain = Format::from_real(Format::to_real(bits) + typename Format::Real(0));
    if (sizeof(Key) == 8 && (plain & kMagnitude) > Format::kInf) plain = kMagnitude;
    keys_[v] = plain ^ ((plain >> (8 * sizeof(Key) - 1)) & kMagnitude);
    if (nan_as_lowest && keys_[v] > kPlusInf) keys_[v] = kMinusInf;
  }

  __device__ KeyIndex extract_max(const LaneIds& layout) {
    Key best = keys_[0];
#pragma unroll
    for (int v = 1; v < kPerLane; ++v) best = max(best, keys_[v]);
    best = subwarp_max<kLanes>(best);
    int id = kMaxExperts;
#pragma unroll
    for (int v = kPerLane - 1; v >= 0; --v) id = keys_[v] == best ? layout.id_at(v) : id;
    id = subwarp_min<kLanes>(id);
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) keys_[v] = layout.id_at(v) == id ? kNone : keys_[v];
    return {best, id};
  }

 private:
  Key keys_[kPerLane];
};

// 16 bit keys: key and id share a word, so one maximum orders both, and a winner need not be removed: the next one is
// the largest below it.
template <class Format, int kLanes, int kPerLane>
class PackedKeys {
 public:
  using Key = int32_t;
  using Word = uint32_t;
  static constexpr int kPerWord = 2;
  using KeyIndex = int32_t;  // key * 1024 + 1023 - id
  static constexpr int kIdBits = 10;
  static constexpr int kIdMask = kMaxExperts - 1;
  static_assert(kMaxExperts == 1 << kIdBits, "an id must fit its bits");
  static constexpr Key kPlusInf = Format::kInf;
  static constexpr Key kMinusInf = ~Key(Format::kInf);

  // The low bits of a packed key, the same for every row: opaque, so that the compiler does not recompute them.
  struct LaneIds {
    int32_t of[kPerLane];
    __device__ explicit LaneIds(RowLayout<Format, kLanes, kPerLane> layout) {
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) {
        of[v] = layout.id_at(v) ^ kIdMask;
        asm("" : "+r"(of[v]));
      }
    }
  };

  static __device__ Key key_of(KeyIndex packed) { return packed >> kIdBits; }
  static __device__ int id_of(KeyIndex packed) { return kIdMask - (packed & kIdMask); }
  static __device__ float value_of(KeyIndex packed) {
    const Key key = key_of(packed);
    return Format::to_real(typename Format::Bits(key < 0 ? key ^ 0x7fff : key));
  }

  __device__ void clear(int v) { packed_[v] = kBelow; }
  __device__ void set(int v, Word pair, const LaneIds& lane_ids, bool nan_as_lowest) {
    const uint32_t plain = add_zero(pair);
    uint32_t signs;  // each half all ones or all zeros
    asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(signs) : "r"(plain));
    const uint32_t keys = plain ^ (signs & 0x7fff7fff);
    int32_t low = int32_t(keys << 16) >> (16 - kIdBits), high = (int32_t(keys) >> (16 - kIdBits)) & ~kIdMask;
    if (nan_as_lowest && low > kPlusInf << kIdBits) low = kMinusInf * kMaxExperts;
    if (nan_as_lowest && high > kPlusInf << kIdBits) high = kMinusInf * kMaxExperts;
    packed_[v] = low + lane_ids.of[v];
    packed_[v + 1] = high | lane_ids.of[v + 1];
  }

  __device__ KeyIndex extract_max(const LaneIds&) {
    // As unsigned, last - 1 is the largest, and everything from `last` upward is small. Two chains: latency counts.
    uint32_t below[2] = {};
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      below[v % 2] = __viaddmax_u32(uint32_t(packed_[v]), uint32_t(-last_), below[v % 2]);
    }
    return last_ += KeyIndex(subwarp_max<kLanes>(max(below[0], below[1])));
  }

 private:
  static constexpr KeyIndex kAbove = 1 << 26;  // every packed key lies between these
  static constexpr KeyIndex kBelow = -kAbove;

  static __device__ uint32_t add_zero(uint32_t pair) {
    uint32_t sum;
    if constexpr (std::is_same_v<Format, Fp16>) {
      asm("add.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(pair), "r"(0));
    } else {  // bf16 has no addition before sm_90
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(pair), "r"(0x3f803f80), "r"(0));
    }
    return sum;
  }

  KeyIndex last_ = kAbove;
  KeyIndex packed_[kPerLane];
};

template <class Format, int kLanes, int kPerLane>
using SortableKeys = std::conditional_t<sizeof(typename Format::Bits) == 2, PackedKeys<Format, kLanes, kPerLane>,
                                 WideKeys<Format, kLanes, kPerLane>>;

}  // namespace moe::cuda
