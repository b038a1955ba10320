// The affine SDE step, its log-probability, and the gradient of everything built on it.
#pragma once

#include "latents.h"

namespace gardo {

// mean = a*x + b*v,  prev = mean + c*z,
// log_prob = offset - scale * mean_over_row((prev - mean)^2).
struct SdeCoefficients {
  RowScalar a, b, c, scale, offset;
  RowScalar kl;  // KL = kl * mean_over_row((v - v_ref)^2)
};

struct SdeStepParams {
  Extent extent;
  Velocity velocity;
  ConstLatents sample;
  SdeCoefficients coef;
  ConstLatents noise;        // null data: drawn from `seed`
  const std::int64_t* seed;  // null, and no noise: z = 0

  float* prev_sample;  // out [B, row_size]
  float* mean;         // out [B, row_size], or null
  float* log_prob;     // out [B]
};

// Noise of element e of row b: lane e % 4 of Philox4x32-10 with key (seed low, seed high) and
// counter (q low, q high, b low, b high), q = e / 4; lanes 0, 1 and lanes 2, 3 become normals by
// Box-Muller. It depends on nothing else, so batches and threads do not change it.
void sde_step_cpu(const SdeStepParams& params);

struct SdeLogProbParams {
  Extent extent;
  Velocity velocity;
  ConstLatents sample;
  ConstLatents prev_sample;
  SdeCoefficients coef;

  float* log_prob;  // out [B]
};

// The bits that sde_step_cpu gave for the same velocity and its `prev_sample`.
void sde_log_prob_cpu(const SdeLogProbParams& params);

// d/dv of a function of log-probabilities and of a KL is affine in the same tensors:
// alpha * (prev - a*x - b*v) + beta * (v - v_ref), row by row, with the weights times `grad`.
struct VelocityGradParams {
  Extent extent;
  Velocity velocity;
  ConstLatents sample;
  ConstLatents prev_sample;
  ConstLatents ref_velocity;  // null data: no KL; rows with beta == 0 are not read
  SdeCoefficients coef;
  const float* alpha;  // [B]
  const float* beta;   // [B], or null without ref_velocity
  RowScalar grad;      // of what is minimised, by the function

  Latents grad_velocity;         // out [B, row_size]
  Latents grad_velocity_uncond;  // out [B, row_size]; with guidance only
};

void velocity_grad_cpu(const VelocityGradParams& params);

}  // namespace gardo
