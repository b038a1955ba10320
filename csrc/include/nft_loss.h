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

enum class NftReduction : int { kMean = 0, kSum = 1 };

struct NftLossParams {
  NftTensors tensors;
  const float* advantage;    // [B]
  const std::uint8_t* gate;  // [B], or null: every row is gated
  float adv_clip;
  float kl_coef;
  NftReduction reduction;  // of the loss over rows, and of the KL over gated rows

  float* loss;     // out [1]
  float* stats;    // out [2]: policy loss, KL
  float* weights;  // out [3, B]: d loss/dv = w[0] * e+ + w[1] * e- + w[2] * (v - v_ref)
};

void nft_loss_cpu(const NftLossParams& params);

struct NftGradParams {
  NftTensors tensors;
  const float* weights;  // [3, B]; rows whose third weight is 0 do not read ref_velocity

  Latents grad_velocity;  // out [B, row_size]
};

void nft_grad_cpu(const NftGradParams& params);

}  // namespace gardo
