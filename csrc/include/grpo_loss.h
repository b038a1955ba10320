// Forward pass of the GRPO loss with gated KL; its backward pass is velocity_grad_cpu.
#pragma once

#include "sde_step.h"

namespace gardo {

enum class KlReduction : int { kGated = 0, kBatch = 1 };

struct GrpoLossParams {
  Extent extent;
  Velocity velocity;
  ConstLatents sample;
  ConstLatents prev_sample;
  ConstLatents ref_velocity;  // null data: no KL; ungated rows are not read
  SdeCoefficients coef;
  const float* old_log_prob;  // [B]
  const float* advantage;     // [B]
  const std::uint8_t* gate;   // [B], or null: every row is gated
  float clip_low, clip_high;  // the ratio is clamped to [clip_low, clip_high]
  float adv_clip;
  float kl_coef;
  KlReduction kl_reduction;

  float* loss;      // out [1]
  float* stats;     // out [3]: policy loss, KL, clip fraction
  float* log_prob;  // out [B]
  float* ratio;     // out [B]
  float* alpha;     // out [B], for velocity_grad_cpu, d loss = 1
  float* beta;      // out [B]
};

void grpo_loss_cpu(const GrpoLossParams& params);

}  // namespace gardo
