#include "noise.h"

#include <algorithm>
#include <cmath>

#include "bits.h"
#include "block_ops.h"
#include "philox.h"
#include "simd.h"

namespace gardo {
namespace {

using std::int64_t;
using std::uint32_t;

struct Pair {
  float first, second;
};

// Natural logarithm of 2^-33 <= u <= 1: log(m * 2^e) = e*log(2) + 2*atanh((m-1)/(m+1)).
__attribute__((always_inline)) inline float log_of(float u) {
  const uint32_t raw = bits<uint32_t>(u);
  const float mantissa = bits<float>((raw & 0x7fffffu) | 0x3f800000u);
  const int exponent = static_cast<int>(raw >> 23) - 127;
  const bool high = mantissa > 1.41421356f;
  const float m = high ? 0.5f * mantissa : mantissa;
  const float e = static_cast<float>(high ? exponent + 1 : exponent);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float z = s * s;  // at most 0.0295: the next term of the series is below 1e-8
  const float series = 1.0f + z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9))));
  return e * 0.693147181f + 2.0f * s * series;
}

// (cos, sin) of 2*pi*u for 0 <= u <= 1, by Taylor series on an eighth of a turn to either side.
__attribute__((always_inline)) inline Pair cos_sin_of_turn(float u) {
  const int quarter = static_cast<int>(4.0f * u + 0.5f);
  const float y = 6.28318531f * (u - 0.25f * static_cast<float>(quarter));  // the rest is exact
  const float z = y * y;
  const float s =
      y * (1.0f + z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880)))));
  const float c =
      1.0f + z * (-1.0f / 2 +
                  z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320 + z * (-1.0f / 3628800)))));
  const bool swap = (quarter & 1) != 0;
  const float cos_magnitude = swap ? s : c;
  const float sin_magnitude = swap ? c : s;
  const bool cos_negative = ((quarter + 1) & 2) != 0;
  const bool sin_negative = (quarter & 2) != 0;
  return {cos_negative ? -cos_magnitude : cos_magnitude,
          sin_negative ? -sin_magnitude : sin_magnitude};
}

// Two normals from two 32-bit words; half a unit keeps the logarithm finite.
__attribute__((always_inline)) inline Pair box_muller(uint32_t first, uint32_t second) {
  const float u1 = (static_cast<float>(first) + 0.5f) * 0x1p-32f;
  const float u2 = (static_cast<float>(second) + 0.5f) * 0x1p-32f;
  const float radius = std::sqrt(std::max(0.0f, -2.0f * log_of(u1)));
  const Pair unit = cos_sin_of_turn(u2);
  return {radius * unit.first, radius * unit.second};
}

constexpr int64_t kQuads = kBlock / 4;

GARDO_CLONES void normals_of_words(const uint32_t* w0, const uint32_t* w1, const uint32_t* w2,
                                   const uint32_t* w3, int64_t quads, float* __restrict out) {
  for (int64_t i = 0; i < quads; ++i) {
    const Pair a = box_muller(w0[i], w1[i]);
    const Pair b = box_muller(w2[i], w3[i]);
    out[4 * i] = a.first;
    out[4 * i + 1] = a.second;
    out[4 * i + 2] = b.first;
    out[4 * i + 3] = b.second;
  }
}

}  // namespace

void philox_normal(std::uint64_t seed, int64_t row, int64_t offset, int64_t n, float* out) {
  uint32_t w0[kQuads], w1[kQuads], w2[kQuads], w3[kQuads];
  uint32_t* const words[4] = {w0, w1, w2, w3};
  const int64_t quads = (n + 3) / 4;
  philox_words(
      {seed, static_cast<std::uint64_t>(row), static_cast<std::uint64_t>(offset / 4), quads},
      words);
  if (n % 4 == 0) {
    normals_of_words(w0, w1, w2, w3, quads, out);
    return;
  }
  float padded[kBlock];
  normals_of_words(w0, w1, w2, w3, quads, padded);
  std::copy(padded, padded + n, out);
}

}  // namespace gardo
