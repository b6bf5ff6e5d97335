// Floating formats as bits, for host and device: an order-preserving integer key, and conversion to
// the type that arithmetic is done in.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define MOE_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MOE_HD inline __attribute__((always_inline))
#else
#define MOE_HD inline
#endif

namespace moe {

enum class DType : int { kFp64 = 0, kFp32 = 1, kFp16 = 2, kBf16 = 3 };

template <class To, class From>
MOE_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes must agree");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// A format is its bits as a signed integer, the bits of +inf, and Real, the type arithmetic is done in.
struct Fp64 {
  using Bits = int64_t;
  using Real = double;
  static constexpr Bits kInf = 0x7ff0000000000000;
  static MOE_HD Real to_real(Bits bits) { return bit_cast<double>(bits); }
  static MOE_HD Bits from_real(Real x) { return bit_cast<Bits>(x); }
};

struct Fp32 {
  using Bits = int32_t;
  using Real = float;
  static constexpr Bits kInf = 0x7f800000;
  static MOE_HD Real to_real(Bits bits) { return bit_cast<float>(bits); }
  static MOE_HD Bits from_real(Real x) { return bit_cast<Bits>(x); }
};

struct Bf16 {
  using Bits = int16_t;
  using Real = float;
  static constexpr Bits kInf = 0x7f80;
  static MOE_HD Real to_real(Bits bits) { return bit_cast<float>(uint32_t(uint16_t(bits)) << 16); }
  static MOE_HD Bits from_real(Real x) {
#if defined(__CUDA_ARCH__)
    Bits bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    const uint32_t b = bit_cast<uint32_t>(x);
    if ((b & 0x7fffffff) > 0x7f800000) return 0x7fc0;            // rounding could turn a NaN into inf
    return Bits((b + 0x7fff + ((b >> 16) & 1)) >> 16);           // nearest, ties to even
#endif
  }
};

struct Fp16 {
  using Bits = int16_t;
  using Real = float;
  static constexpr Bits kInf = 0x7c00;

  static MOE_HD Real to_real(Bits bits) {
#if defined(__CUDA_ARCH__)
    float real;
    asm("cvt.f32.f16 %0, %1;" : "=f"(real) : "h"(bits));
    return real;
#else
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = uint32_t(bits & 0x7fff);
    if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x0400) return bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
    const float tiny = float(magnitude) * 0x1p-24f;              // subnormal, exact in fp32
    return sign ? -tiny : tiny;
#endif
  }

  static MOE_HD Bits from_real(Real x) {
#if defined(__CUDA_ARCH__)
    Bits bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    const uint32_t b = bit_cast<uint32_t>(x), sign = (b >> 16) & 0x8000, magnitude = b & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7e00;
    if (magnitude >= 0x477ff000) return Bits(sign | 0x7c00);     // rounds to 65536 or more
    if (magnitude < 0x38800000) {                                // subnormal: let fp32 addition round
      const float shifted = bit_cast<float>(magnitude) + 0.5f;
      return Bits(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return Bits(sign | ((rounded - (112u << 23)) >> 13));
#endif
  }
};

// Keys order like the floats they represent: the sign and magnitude read as a two's complement integer.
// -0 equals +0, and NaN sorts as -inf. kTaken lies below every key, so it marks an expert that no round may pick.
template <class Format>
struct Order {
  using Key = typename Format::Bits;
  static constexpr Key kTaken = std::numeric_limits<Key>::min();
  static constexpr Key kMagnitude = std::numeric_limits<Key>::max();
  static constexpr Key kPlusInf = Format::kInf;
  static constexpr Key kMinusInf = Key(-Format::kInf);

  static MOE_HD bool is_nan(Key bits) { return Key(bits & kMagnitude) > Format::kInf; }

  static MOE_HD Key key(Key bits) {
    const Key magnitude = bits & kMagnitude;
    const Key signed_key = bits < 0 ? Key(-magnitude) : magnitude;
    return magnitude > Format::kInf ? kMinusInf : signed_key;
  }

  static MOE_HD typename Format::Real value(Key key) {
    return Format::to_real(key < 0 ? Key(Key(-key) | kTaken) : key);
  }
};

}  // namespace moe
