// Loops over a block from one expression: eight elements at a time, then one by one.
//
// A body is a generic lambda that works on the elements from `i` that fit into its type T, Float8
// or float. A pass over memory should be one such loop: each further loop over a block passes it
// through the first-level cache again, which a few streams of latents fill already.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace gardo {

template <typename T>
GARDO_INLINE inline T load_lanes(const float* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

template <typename T>
GARDO_INLINE inline void store_lanes(const T& value, float* p) {
  std::memcpy(p, &value, sizeof(T));
}

GARDO_INLINE inline Float8 abs_lanes(Float8 x) {
  return x < 0 ? -x : x;
}
GARDO_INLINE inline float abs_lanes(float x) {
  return std::fabs(x);
}

// body(T{}, i); the value of the first argument means nothing.
template <typename Body>
GARDO_INLINE inline void for_lanes(std::int64_t n, Body body) {
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) body(Float8{}, i);
  for (; i < n; ++i) body(0.0f, i);
}

// Sums kSums terms, which terms(i, T out[kSums]) gives. The order depends on n alone: 8*kVectors
// lanes in float32, which in double are added pairwise. (One chain of additions would wait as long
// as all that is above takes.)
template <int kVectors, int kSums, typename Terms>
GARDO_INLINE inline void sum_lanes(std::int64_t n, double (&totals)[kSums], Terms terms) {
  constexpr int kLanes = 8 * kVectors;
  Float8 sums[kSums][kVectors] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kVectors; ++j) {
      Float8 values[kSums];
      terms(i + 8 * j, values);
      for (int k = 0; k < kSums; ++k) sums[k][j] += values[k];
    }
  }
  float lanes[kSums][kLanes];
  std::memcpy(lanes, sums, sizeof(lanes));
  for (int lane = 0; i < n; ++i, ++lane) {
    float values[kSums];
    terms(i, values);
    for (int k = 0; k < kSums; ++k) lanes[k][lane] += values[k];
  }
  for (int k = 0; k < kSums; ++k) {
    double wide[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) wide[lane] = static_cast<double>(lanes[k][lane]);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) wide[lane] += wide[lane + half];
    }
    totals[k] = wide[0];
  }
}

// f(std::true_type{}) or f(std::false_type{}): a loop for each, without a branch inside.
template <typename F>
GARDO_INLINE inline void with_flag(bool flag, F f) {
  if (flag) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

}  // namespace gardo
