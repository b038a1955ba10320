#include "sde_step.h"

#include "blocks.h"
#include "huge_pages.h"
#include "log_prob.h"
#include "noise.h"

namespace gardo {

using std::int64_t;

void sde_step_cpu(const SdeStepParams& p) {
  prefer_huge_pages({p.prev_sample, DType::kFloat32}, p.extent);
  prefer_huge_pages({p.mean, DType::kFloat32}, p.extent);
  RowSums squares(p.extent);
  const std::uint64_t seed = p.seed == nullptr ? 0 : static_cast<std::uint64_t>(*p.seed);
  for_each_block(p.extent, [&](int64_t row, int64_t offset, int64_t element, int64_t n,
                               int64_t block, Scratch& s) {
    const float* v = load_velocity(p.velocity, offset, n, s);
    const float* x = load_block(p.sample, offset, n, s.w);
    float* mean = p.mean == nullptr ? s.p : p.mean + offset;
    affine(p.coef.a[row], x, p.coef.b[row], v, n, mean);
    float* prev = p.prev_sample + offset;
    if (p.noise.data != nullptr) {
      add_scaled(mean, p.coef.c[row], load_block(p.noise, offset, n, s.q), n, prev);
    } else if (p.seed != nullptr) {
      philox_normal(seed, row, element, n, s.q);
      add_scaled(mean, p.coef.c[row], s.q, n, prev);
    } else {
      std::copy(mean, mean + n, prev);
    }
    squares[block] = sum_squared_difference(prev, mean, n);
  });
  for (int64_t row = 0; row < p.extent.rows; ++row) {
    p.log_prob[row] = log_prob_of(p.coef, row, squares.total(row), p.extent.row_size);
  }
}

void sde_log_prob_cpu(const SdeLogProbParams& p) {
  RowSums squares(p.extent);
  for_each_block(
      p.extent, [&](int64_t row, int64_t offset, int64_t, int64_t n, int64_t block, Scratch& s) {
        squares[block] = squared_residual(p.coef, row, load_velocity(p.velocity, offset, n, s),
                                          load_block(p.sample, offset, n, s.w),
                                          load_block(p.prev_sample, offset, n, s.q), n, s.p);
      });
  for (int64_t row = 0; row < p.extent.rows; ++row) {
    p.log_prob[row] = log_prob_of(p.coef, row, squares.total(row), p.extent.row_size);
  }
}

void affine_backward_cpu(const AffineBackwardParams& p) {
  prefer_huge_pages(p.grad_velocity, p.extent);
  prefer_huge_pages(p.grad_velocity_uncond, p.extent);
  for_each_block<Order::kBackward>(
      p.extent, [&](int64_t row, int64_t offset, int64_t, int64_t n, int64_t, Scratch& s) {
        const float alpha = p.alpha[row];
        const float beta = p.beta == nullptr ? 0.0f : p.beta[row];
        const bool guided = p.velocity.uncond.data != nullptr;
        float* grad = guided ? s.r : block_target(p.grad_velocity, offset, s.r);
        if (alpha == 0.0f && beta == 0.0f) {
          std::fill(grad, grad + n, 0.0f);
        } else {
          const float* v = load_velocity(p.velocity, offset, n, s);
          if (alpha != 0.0f) {
            const float* x = load_block(p.sample, offset, n, s.w);
            affine(p.coef.a[row], x, p.coef.b[row], v, n, s.p);
            scaled_difference(alpha, load_block(p.prev_sample, offset, n, s.q), s.p, n, grad);
          } else {
            std::fill(grad, grad + n, 0.0f);
          }
          if (beta != 0.0f) {
            add_scaled_difference(beta, v, load_block(p.ref_velocity, offset, n, s.w), n, grad);
          }
        }
        if (!guided) {
          store_block(grad, p.grad_velocity, offset, n);
          return;
        }
        float* cond = block_target(p.grad_velocity, offset, s.p);
        scale(p.velocity.guidance_scale, grad, n, cond);
        store_block(cond, p.grad_velocity, offset, n);
        float* uncond = block_target(p.grad_velocity_uncond, offset, s.p);
        scale(1.0f - p.velocity.guidance_scale, grad, n, uncond);
        store_block(uncond, p.grad_velocity_uncond, offset, n);
      });
}

}  // namespace gardo
