// Forward pass of the GRPO loss with gated KL; its backward pass is velocity_grad_cpu.
#pragma once

#include "sde_step.h"

namespace gardo {

// The loss is the mean over the batch plus kl_coef times the KL's mean over the gated rows, or its
// sum over the batch size; or all is summed, and the weights are the caller's.
enum class Reduction : int { kGated = 0, kBatch = 1, kSum = 2 };

// With noise z the ratio is GRPO-Guard's: log ratio = mean(z * (m - m_old)), m_old = prev - c*z.
// The backward pass then takes z in place of prev - a*x - b*v.
struct GrpoLossParams {
  Extent extent;
  Velocity velocity;
  ConstLatents sample;
  ConstLatents prev_sample;
  ConstLatents ref_velocity;  // null data: no KL; ungated rows are not read
  ConstLatents noise;         // of the step; null data: the ratio is that of the log-probabilities
  SdeCoefficients coef;
  const float* old_log_prob;  // [B]
  const float* advantage;     // [B]
  const std::uint8_t* gate;   // [B], or null: every row is gated
  float clip_low, clip_high;  // the ratio is clamped to [clip_low, clip_high]
  float adv_clip;
  float kl_coef;
  Reduction reduction;

  float* loss;      // out [1]
  float* stats;     // out [3]: policy loss, KL, clip fraction
  float* log_prob;  // out [B]
  float* ratio;     // out [B]
  float* alpha;     // out [B], for velocity_grad_cpu, d loss = 1
  float* beta;      // out [B]
};

void grpo_loss_cpu(const GrpoLossParams& params);

}  // namespace gardo
