// The DiffusionNFT loss with gated KL, forward and backward.
#pragma once

#include "latents.h"

namespace gardo {

// e+ = x_t - t*v+ - x0 with v+ = beta*v + (1-beta)*v_old;  e- likewise, v- = (1+beta)*v_old -
// beta*v
struct NftTensors {
  Extent extent;
  ConstLatents velocity, old_velocity, x0, xt;
  ConstLatents ref_velocity;  // null data: no KL; ungated rows are not read
  RowScalar t;
  double beta;
};

struct NftLossParams {
  NftTensors tensors;
  const float* advantage;    // [B]
  const std::uint8_t* gate;  // [B], or null: every row is gated
  float adv_clip;
  float kl_coef;

  float* loss;           // out [1]
  float* policy_loss;    // out [1]
  float* kl;             // out [1]
  float* grad_positive;  // out [B]: d loss/dv = grad_positive * e+ + grad_negative * e-
  float* grad_negative;  // out [B]                + grad_kl * (v - v_ref)
  float* grad_kl;        // out [B]
};

void nft_loss_cpu(const NftLossParams& params);

struct NftBackwardParams {
  NftTensors tensors;
  const float* grad_positive;  // [B]
  const float* grad_negative;  // [B]
  const float* grad_kl;        // [B]; rows with 0 do not read ref_velocity

  Latents grad_velocity;  // out [B, row_size]
};

void nft_backward_cpu(const NftBackwardParams& params);

}  // namespace gardo
