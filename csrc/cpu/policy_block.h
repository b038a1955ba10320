// The SDE transition of the policy on one block: the step, the log-probability that sampling and
// training share, and the gradient.
//
// All evaluate v and mean = a*x + b*v by the same expressions and add (prev - mean)^2 in the same
// order, so equal inputs give equal bits: the on-policy ratio is exactly 1.
#pragma once

#include "blocks.h"
#include "sde_step.h"

namespace gardo {

// A block of one row, with velocities of type V (float or BFloat16). Passed by value: no store can
// change it, so that the loops keep it in registers.
template <typename V>
struct PolicyBlock {
  const V* cond;
  const V* uncond;  // null: no guidance
  float guidance_scale;
  const float* sample;
  float a, b;
  std::int64_t n;
};

// Uses the first three inputs of the scratch.
template <typename V>
PolicyBlock<V> load_policy(const Velocity& velocity, ConstLatents sample,
                           const SdeCoefficients& coef, std::int64_t row, std::int64_t offset,
                           std::int64_t n, Scratch& s) {
  const bool guided = velocity.uncond.data != nullptr;
  return {load_velocity<V>(velocity.cond, offset, n, s.in[0]),
          guided ? load_velocity<V>(velocity.uncond, offset, n, s.in[1]) : nullptr,
          velocity.guidance_scale,
          load_block(sample, offset, n, s.in[2]),
          coef.a[row],
          coef.b[row],
          n};
}

// prev = mean + c*noise; noise may be null for 0. Returns the sum of (prev - mean)^2.
double step_block(PolicyBlock<float> block, float c, const float* noise, float* prev, float* mean);
double step_block(PolicyBlock<BFloat16> block, float c, const float* noise, float* prev,
                  float* mean);

struct PolicySums {
  double residual;  // of (prev - mean)^2
  double kl;        // of (v - ref)^2; 0 without ref
  double shift;     // of noise * (mean - (prev - c*noise)); 0 without noise
};

// `ref` and `noise` may be null.
PolicySums policy_sums(PolicyBlock<float> block, const float* prev, const float* ref, float c,
                       const float* noise);
PolicySums policy_sums(PolicyBlock<BFloat16> block, const float* prev, const BFloat16* ref, float c,
                       const float* noise);

// alpha*(prev - mean) + beta*(v - ref), by the chain rule of the guidance. A null `prev` or `ref`
// leaves its term out. `grad_uncond` is written with guidance only.
void policy_gradient(PolicyBlock<float> block, float alpha, const float* prev, float beta,
                     const float* ref, float* grad_cond, float* grad_uncond);
void policy_gradient(PolicyBlock<BFloat16> block, float alpha, const float* prev, float beta,
                     const BFloat16* ref, BFloat16* grad_cond, BFloat16* grad_uncond);

inline float log_prob_of(const SdeCoefficients& coef, std::int64_t row, double squares,
                         std::int64_t row_size) {
  const double mean_square = squares / static_cast<double>(row_size);
  return static_cast<float>(static_cast<double>(coef.offset[row]) -
                            static_cast<double>(coef.scale[row]) * mean_square);
}

}  // namespace gardo
