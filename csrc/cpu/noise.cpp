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

constexpr int64_t kQuads = kBlock / 4;

// Box-Muller by short loops through the first-level cache. In a single loop the chain of operations
// that leads to a normal is longer than what a processor looks ahead, and most units wait.
struct Polar {
  float radius[kQuads], cosine[kQuads], sine[kQuads];
};

// In (0, 1]; half a unit keeps the logarithm finite.
__attribute__((always_inline)) inline float uniform(uint32_t word) {
  return (static_cast<float>(word) + 0.5f) * 0x1p-32f;
}

// sqrt(-2 log u), u >= 2^-33: log(m * 2^e) = e*log(2) + 2*atanh((m-1)/(m+1)).
GARDO_CLONES void radii(const uint32_t* words, int64_t n, float* __restrict out) {
  float exponents[kQuads], ratios[kQuads];
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t raw = bits<uint32_t>(uniform(words[i]));
    // m in (sqrt(1/2), sqrt(2)]: 0x3504f3 is the mantissa of the square root of 2.
    const int exponent = static_cast<int>(raw - 0x3f3504f4u) >> 23;
    const float m = bits<float>(raw - (static_cast<uint32_t>(exponent) << 23));
    exponents[i] = static_cast<float>(exponent);
    ratios[i] = (m - 1.0f) / (m + 1.0f);
  }
  for (int64_t i = 0; i < n; ++i) {
    const float s = ratios[i];
    const float z = s * s;  // at most 0.0295: the next term of the series is below 1e-8
    const float series = 1.0f + z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9))));
    const float log = exponents[i] * 0.693147181f + 2.0f * s * series;
    out[i] = std::max(0.0f, -2.0f * log);
  }
  for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(out[i]);
}

// (cos, sin) of 2*pi*u for 0 <= u <= 1, by Taylor series on an eighth of a turn to either side.
GARDO_CLONES void turns(const uint32_t* words, int64_t n, float* __restrict cosine,
                        float* __restrict sine) {
  int quarters[kQuads];
  float angles[kQuads];
  for (int64_t i = 0; i < n; ++i) {
    const float u = uniform(words[i]);
    quarters[i] = static_cast<int>(4.0f * u + 0.5f);
    // The difference is exact.
    angles[i] = 6.28318531f * (u - 0.25f * static_cast<float>(quarters[i]));
  }
  for (int64_t i = 0; i < n; ++i) {
    const float y = angles[i];
    const float z = y * y;
    sine[i] =
        y * (1.0f + z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880)))));
  }
  for (int64_t i = 0; i < n; ++i) {
    const float z = angles[i] * angles[i];
    cosine[i] =
        1.0f + z * (-1.0f / 2 + z * (1.0f / 24 + z * (-1.0f / 720 +
                                                      z * (1.0f / 40320 + z * (-1.0f / 3628800)))));
  }
  for (int64_t i = 0; i < n; ++i) {
    const auto quarter = static_cast<uint32_t>(quarters[i]);
    const bool swap = (quarter & 1u) != 0;
    const uint32_t c = bits<uint32_t>(swap ? sine[i] : cosine[i]);
    const uint32_t s = bits<uint32_t>(swap ? cosine[i] : sine[i]);
    // The second bit is the sign.
    cosine[i] = bits<float>(c ^ (((quarter + 1u) & 2u) << 30));
    sine[i] = bits<float>(s ^ ((quarter & 2u) << 30));
  }
}

GARDO_CLONES void interleave(const Polar& a, const Polar& b, int64_t quads, float* __restrict out) {
  for (int64_t i = 0; i < quads; ++i) {
    out[4 * i] = a.radius[i] * a.cosine[i];
    out[4 * i + 1] = a.radius[i] * a.sine[i];
    out[4 * i + 2] = b.radius[i] * b.cosine[i];
    out[4 * i + 3] = b.radius[i] * b.sine[i];
  }
}

}  // namespace

void philox_normal(std::uint64_t seed, int64_t row, int64_t offset, int64_t n, float* out) {
  uint32_t words[4][kQuads];
  uint32_t* const rows[4] = {words[0], words[1], words[2], words[3]};
  const int64_t quads = (n + 3) / 4;
  philox_words(
      {seed, static_cast<std::uint64_t>(row), static_cast<std::uint64_t>(offset / 4), quads}, rows);
  Polar a, b;
  radii(words[0], quads, a.radius);
  turns(words[1], quads, a.cosine, a.sine);
  radii(words[2], quads, b.radius);
  turns(words[3], quads, b.cosine, b.sine);
  if (n % 4 == 0) {
    interleave(a, b, quads, out);
    return;
  }
  float padded[kBlock];
  interleave(a, b, quads, padded);
  std::copy(padded, padded + n, out);
}

}  // namespace gardo
