#include "block_ops.h"

#include <algorithm>

#include "bits.h"
#include "lanes.h"

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

GARDO_CLONES void widen_half(const uint16_t* in, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = half_to_float(in[i]);
}

GARDO_CLONES void widen_bfloat(const BFloat16* in, int64_t n, float* out) {
  for_lanes(n, [&](auto lanes, int64_t i)
                   GARDO_INLINE { store_lanes(load_lanes<decltype(lanes)>(in + i), out + i); });
}

GARDO_CLONES void narrow_half(const float* in, int64_t n, uint16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_half(in[i]);
}

GARDO_CLONES void narrow_bfloat(const float* in, int64_t n, BFloat16* out) {
  for_lanes(n, [&](auto lanes, int64_t i)
                   GARDO_INLINE { store_lanes(load_lanes<decltype(lanes)>(in + i), out + i); });
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
      widen_bfloat(static_cast<const BFloat16*>(tensor.data) + offset, n, scratch);
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
      narrow_bfloat(values, n, static_cast<BFloat16*>(tensor.data) + offset);
      break;
  }
}

GARDO_CLONES double sum_squares(const float* x, int64_t n) {
  double total[1];
  sum_lanes<4>(n, total, [&](int64_t i, auto* out) GARDO_INLINE {
    using T = std::remove_pointer_t<decltype(out)>;
    const T v = load_lanes<T>(x + i);
    *out = v * v;
  });
  return total[0];
}

GARDO_CLONES double sum_squared_scaled_difference(float a, const float* p, float b, const float* q,
                                                  int64_t n) {
  double total[1];
  sum_lanes<4>(n, total, [&](int64_t i, auto* out) GARDO_INLINE {
    using T = std::remove_pointer_t<decltype(out)>;
    const T d = a * load_lanes<T>(p + i) - b * load_lanes<T>(q + i);
    *out = d * d;
  });
  return total[0];
}

}  // namespace gardo
