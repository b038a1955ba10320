// bfloat16 is the upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bits.h"
#include "simd.h"

namespace gardo {

struct BFloat16 {
  std::uint16_t raw;
};

// Rounds to nearest, ties to even; the result is in the upper half. On float with uint32_t, or on
// vectors of them.
template <typename U, typename F>
GARDO_INLINE inline U bfloat_bits(F value) {
  const U raw = bits<U>(value);
  const U rounded = raw + 0x7fffu + ((raw >> 16) & 1u);
  const U nan = U{} + 0x7fc00000u;
  return value != value ? nan : rounded;
}

template <typename T>
GARDO_INLINE inline T load_lanes(const BFloat16* p) {
  if constexpr (std::is_same_v<T, float>) {
    return bits<float>(static_cast<std::uint32_t>(p->raw) << 16);
  } else {
    // GCC makes one load of this, and six instructions of __builtin_convertvector.
    const UInt32x8 raw = {p[0].raw, p[1].raw, p[2].raw, p[3].raw,
                          p[4].raw, p[5].raw, p[6].raw, p[7].raw};
    return bits<Float8>(raw << 16);
  }
}

GARDO_INLINE inline void store_lanes(float value, BFloat16* p) {
  p->raw = static_cast<std::uint16_t>(bfloat_bits<std::uint32_t>(value) >> 16);
}

GARDO_INLINE inline void store_lanes(Float8 value, BFloat16* p) {
  const UInt32x8 raw = bfloat_bits<UInt32x8>(value);
  UInt16x8 halves[2];
  std::memcpy(halves, &raw, sizeof(raw));
  const UInt16x8 upper = __builtin_shufflevector(halves[0], halves[1], 1, 3, 5, 7, 9, 11, 13, 15);
  std::memcpy(p, &upper, sizeof(upper));
}

}  // namespace gardo
