#include "sde_step.h"

#include <algorithm>

#include "huge_pages.h"
#include "noise.h"
#include "policy_block.h"

namespace gardo {

using std::int64_t;

void sde_step_cpu(const SdeStepParams& p) {
  prefer_huge_pages({p.prev_sample, DType::kFloat32}, p.extent);
  prefer_huge_pages({p.mean, DType::kFloat32}, p.extent);
  RowSums squares(p.extent);
  const std::uint64_t seed = p.seed == nullptr ? 0 : static_cast<std::uint64_t>(*p.seed);
  for_each_block(p.extent, [&](int64_t row, int64_t offset, int64_t element, int64_t n,
                               int64_t block, Scratch& s) {
    const float* noise = nullptr;
    if (p.noise.data != nullptr) {
      noise = load_block(p.noise, offset, n, s.in[3]);
    } else if (p.seed != nullptr) {
      philox_normal(seed, row, element, n, s.in[3]);
      noise = s.in[3];
    }
    float* mean = p.mean == nullptr ? s.out[0] : p.mean + offset;
    squares[block] = step_block(load_policy(p.velocity, p.sample, p.coef, row, offset, n, s),
                                p.coef.c[row], noise, p.prev_sample + offset, mean);
  });
  for (int64_t row = 0; row < p.extent.rows; ++row) {
    p.log_prob[row] = log_prob_of(p.coef, row, squares.total(row), p.extent.row_size);
  }
}

void sde_log_prob_cpu(const SdeLogProbParams& p) {
  RowSums squares(p.extent);
  for_each_block(
      p.extent, [&](int64_t row, int64_t offset, int64_t, int64_t n, int64_t block, Scratch& s) {
        const float* prev = load_block(p.prev_sample, offset, n, s.in[3]);
        const PolicyBlock policy = load_policy(p.velocity, p.sample, p.coef, row, offset, n, s);
        squares[block] = policy_sums(policy, prev, nullptr).residual;
      });
  for (int64_t row = 0; row < p.extent.rows; ++row) {
    p.log_prob[row] = log_prob_of(p.coef, row, squares.total(row), p.extent.row_size);
  }
}

void affine_backward_cpu(const AffineBackwardParams& p) {
  prefer_huge_pages(p.grad_velocity, p.extent);
  prefer_huge_pages(p.grad_velocity_uncond, p.extent);
  const bool guided = p.velocity.uncond.data != nullptr;
  for_each_block<Order::kBackward>(p.extent, [&](int64_t row, int64_t offset, int64_t, int64_t n,
                                                 int64_t, Scratch& s) {
    const float alpha = p.alpha[row];
    const float beta = p.beta == nullptr ? 0.0f : p.beta[row];
    float* cond = block_target(p.grad_velocity, offset, s.out[0]);
    float* uncond = guided ? block_target(p.grad_velocity_uncond, offset, s.out[1]) : nullptr;
    if (alpha == 0.0f && beta == 0.0f) {
      std::fill(cond, cond + n, 0.0f);
      if (guided) std::fill(uncond, uncond + n, 0.0f);
    } else {
      // A term without weight is left out, whatever its tensors hold.
      const float* prev = alpha == 0.0f ? nullptr : load_block(p.prev_sample, offset, n, s.in[3]);
      const float* ref = beta == 0.0f ? nullptr : load_block(p.ref_velocity, offset, n, s.in[4]);
      policy_gradient(load_policy(p.velocity, p.sample, p.coef, row, offset, n, s), alpha, prev,
                      beta, ref, cond, uncond);
    }
    store_block(cond, p.grad_velocity, offset, n);
    if (guided) store_block(uncond, p.grad_velocity_uncond, offset, n);
  });
}

}  // namespace gardo
