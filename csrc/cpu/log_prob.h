// The log-probability that sampling and training share: the same primitives in the same order.
#pragma once

#include "block_ops.h"
#include "sde_step.h"

namespace gardo {

// Sum of (prev - a*x - b*v)^2 over a block; `mean` is scratch.
inline double squared_residual(const SdeCoefficients& coef, std::int64_t row, const float* v,
                               const float* x, const float* prev, std::int64_t n, float* mean) {
  affine(coef.a[row], x, coef.b[row], v, n, mean);
  return sum_squared_difference(prev, mean, n);
}

inline float log_prob_of(const SdeCoefficients& coef, std::int64_t row, double squares,
                         std::int64_t row_size) {
  const double mean_square = squares / static_cast<double>(row_size);
  return static_cast<float>(static_cast<double>(coef.offset[row]) -
                            static_cast<double>(coef.scale[row]) * mean_square);
}

}  // namespace gardo
