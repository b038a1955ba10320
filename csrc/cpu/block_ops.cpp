#include "block_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd.h"

namespace gardo {
namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;

template <typename To, typename From>
__attribute__((always_inline)) inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits: sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

__attribute__((always_inline)) inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  const float subnormal = static_cast<float>(static_cast<int>(mantissa)) * 0x1p-24f;
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  const uint32_t magnitude =
      exponent == 0 ? bits<uint32_t>(subnormal) : (wide << 23) | (mantissa << 13);
  return bits<float>(sign | magnitude);
}

// Rounds to nearest, ties to even.
__attribute__((always_inline)) inline uint16_t float_to_half(float value) {
  const uint32_t raw = bits<uint32_t>(value);
  const uint32_t sign = (raw >> 16) & 0x8000u;
  const uint32_t magnitude = raw & 0x7fffffffu;
  // Adding 0.5 lets the hardware round a subnormal result: the last bit of 0.5 + x is 2^-24.
  const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - bits<uint32_t>(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= bits<uint32_t>(65520.0f) ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(sign | half);
}

__attribute__((always_inline)) inline uint16_t float_to_bfloat(float value) {
  const uint32_t raw = bits<uint32_t>(value);
  const uint32_t rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
  const bool nan = (raw & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(nan ? (raw >> 16) | 0x40u : rounded);
}

GARDO_CLONES void widen_half(const uint16_t* in, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = half_to_float(in[i]);
}

GARDO_CLONES void widen_bfloat(const uint16_t* in, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bits<float>(static_cast<uint32_t>(in[i]) << 16);
}

GARDO_CLONES void narrow_half(const float* in, int64_t n, uint16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_half(in[i]);
}

GARDO_CLONES void narrow_bfloat(const float* in, int64_t n, uint16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_bfloat(in[i]);
}

// Sums term(i) over 32 lanes in float32 (at most 32 terms each in a block), then in double.
template <typename Vector, typename Scalar>
__attribute__((always_inline)) inline double sum_block(int64_t n, Vector vector_term,
                                                       Scalar scalar_term) {
  constexpr int64_t kWidth = 8, kVectors = 4, kLanes = kWidth * kVectors;
  Float8 sums[kVectors] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kVectors; ++j) sums[j] += vector_term(i + j * kWidth);
  }
  float lanes[kLanes];
  std::memcpy(lanes, sums, sizeof(lanes));
  for (int64_t lane = 0; i < n; ++i, ++lane) lanes[lane] += scalar_term(i);
  double total = 0.0;
  for (const float lane : lanes) total += lane;
  return total;
}

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

// Philox4x32-10 (Salmon et al., SC 2011) for quads [first, first + kQuads) of a row.
GARDO_CLONES void philox_words(uint32_t key0, uint32_t key1, uint32_t row_low, uint32_t row_high,
                               uint32_t first_low, uint32_t first_high, int64_t quads,
                               uint32_t* __restrict w0, uint32_t* __restrict w1,
                               uint32_t* __restrict w2, uint32_t* __restrict w3) {
  for (int64_t i = 0; i < quads; ++i) {
    const uint32_t low = first_low + static_cast<uint32_t>(i);
    uint32_t c0 = low, c1 = first_high + (low < first_low ? 1u : 0u), c2 = row_low, c3 = row_high;
    uint32_t k0 = key0, k1 = key1;
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0;
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    w0[i] = c0;
    w1[i] = c1;
    w2[i] = c2;
    w3[i] = c3;
  }
}

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

const float* load_block(ConstLatents tensor, int64_t offset, int64_t n, float* scratch) {
  switch (tensor.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(tensor.data) + offset;
    case DType::kFloat16:
      widen_half(static_cast<const uint16_t*>(tensor.data) + offset, n, scratch);
      break;
    case DType::kBFloat16:
      widen_bfloat(static_cast<const uint16_t*>(tensor.data) + offset, n, scratch);
      break;
  }
  return scratch;
}

void store_block(const float* values, Latents tensor, int64_t offset, int64_t n) {
  switch (tensor.dtype) {
    case DType::kFloat32:
      std::copy(values, values + n, static_cast<float*>(tensor.data) + offset);
      break;
    case DType::kFloat16:
      narrow_half(values, n, static_cast<uint16_t*>(tensor.data) + offset);
      break;
    case DType::kBFloat16:
      narrow_bfloat(values, n, static_cast<uint16_t*>(tensor.data) + offset);
      break;
  }
}

GARDO_CLONES void guide(const float* cond, const float* uncond, float scale, int64_t n,
                        float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = uncond[i] + scale * (cond[i] - uncond[i]);
}

GARDO_CLONES void affine(float a, const float* x, float b, const float* y, int64_t n,
                         float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a * x[i] + b * y[i];
}

GARDO_CLONES void add_scaled(const float* x, float c, const float* y, int64_t n,
                             float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] + c * y[i];
}

GARDO_CLONES void scaled_difference(float a, const float* p, const float* q, int64_t n,
                                    float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a * (p[i] - q[i]);
}

GARDO_CLONES void add_scaled_difference(float a, const float* p, const float* q, int64_t n,
                                        float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] += a * (p[i] - q[i]);
}

GARDO_CLONES void scale(float a, const float* x, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a * x[i];
}

GARDO_CLONES void denoising_error(const float* xt, float t, const float* v, const float* x0,
                                  int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = (xt[i] - t * v[i]) - x0[i];
}

GARDO_CLONES double sum_squared_difference(const float* p, const float* q, int64_t n) {
  return sum_block(
      n,
      [=](int64_t i) __attribute__((always_inline)) {
        const Float8 d = load8(p + i) - load8(q + i);
        return d * d;
      },
      [=](int64_t i) { return (p[i] - q[i]) * (p[i] - q[i]); });
}

GARDO_CLONES double sum_squared_scaled_difference(float a, const float* p, float b, const float* q,
                                                  int64_t n) {
  return sum_block(
      n,
      [=](int64_t i) __attribute__((always_inline)) {
        const Float8 d = a * load8(p + i) - b * load8(q + i);
        return d * d;
      },
      [=](int64_t i) { return (a * p[i] - b * q[i]) * (a * p[i] - b * q[i]); });
}

GARDO_CLONES double sum_squares(const float* x, int64_t n) {
  return sum_block(
      n,
      [=](int64_t i) __attribute__((always_inline)) {
        const Float8 v = load8(x + i);
        return v * v;
      },
      [=](int64_t i) { return x[i] * x[i]; });
}

GARDO_CLONES double sum_abs(const float* x, int64_t n) {
  return sum_block(
      n,
      [=](int64_t i) __attribute__((always_inline)) {
        const Float8 v = load8(x + i);
        return v < 0 ? -v : v;
      },
      [=](int64_t i) { return std::fabs(x[i]); });
}

void philox_normal(std::uint64_t seed, int64_t row, int64_t offset, int64_t n, float* out) {
  uint32_t w0[kQuads], w1[kQuads], w2[kQuads], w3[kQuads];
  const auto first = static_cast<std::uint64_t>(offset / 4);
  const auto row_index = static_cast<std::uint64_t>(row);
  const int64_t quads = (n + 3) / 4;
  philox_words(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
               static_cast<uint32_t>(row_index), static_cast<uint32_t>(row_index >> 32),
               static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32), quads, w0, w1, w2,
               w3);
  if (n % 4 == 0) {
    normals_of_words(w0, w1, w2, w3, quads, out);
    return;
  }
  float padded[kBlock];
  normals_of_words(w0, w1, w2, w3, quads, padded);
  std::copy(padded, padded + n, out);
}

}  // namespace gardo
