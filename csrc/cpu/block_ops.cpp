#include "block_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bits.h"
#include "simd.h"

namespace gardo {
namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;

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
  // Pairwise: one chain of 32 additions would wait as long as all that is above takes.
  double d[kWidth];
  for (int64_t k = 0; k < kWidth; ++k) {
    const auto lane = [&](int64_t j) { return static_cast<double>(lanes[j * kWidth + k]); };
    d[k] = (lane(0) + lane(1)) + (lane(2) + lane(3));
  }
  return ((d[0] + d[4]) + (d[2] + d[6])) + ((d[1] + d[5]) + (d[3] + d[7]));
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

float* block_target(Latents tensor, int64_t offset, float* scratch) {
  return tensor.dtype == DType::kFloat32 ? static_cast<float*>(tensor.data) + offset : scratch;
}

void store_block(const float* values, Latents tensor, int64_t offset, int64_t n) {
  switch (tensor.dtype) {
    case DType::kFloat32: {
      float* out = static_cast<float*>(tensor.data) + offset;
      if (values != out) std::copy(values, values + n, out);
      break;
    }
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

}  // namespace gardo
