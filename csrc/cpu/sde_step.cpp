#include "sde_step.h"

#include <algorithm>

#include "huge_pages.h"
#include "noise.h"
#include "policy_block.h"

namespace gardo {
namespace {

using std::int64_t;

template <typename V>
void step_blocks(const SdeStepParams& p, RowSums& squares) {
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
    squares[block] = step_block(load_policy<V>(p.velocity, p.sample, p.coef, row, offset, n, s),
                                p.coef.c[row], noise, p.prev_sample + offset, mean);
  });
}

template <typename V>
void add_squares(const SdeLogProbParams& p, RowSums& squares) {
  for_each_block(p.extent, [&](int64_t row, int64_t offset, int64_t, int64_t n, int64_t block,
                               Scratch& s) {
    const float* prev = load_block(p.prev_sample, offset, n, s.in[3]);
    const PolicyBlock<V> policy = load_policy<V>(p.velocity, p.sample, p.coef, row, offset, n, s);
    squares[block] = policy_sums(policy, prev, nullptr, 0.0f, nullptr).residual;
  });
}

template <typename V>
void gradient_blocks(const VelocityGradParams& p) {
  const bool guided = p.velocity.uncond.data != nullptr;
  for_each_block<Order::kBackward>(p.extent, [&](int64_t row, int64_t offset, int64_t, int64_t n,
                                                 int64_t, Scratch& s) {
    const float alpha = p.alpha[row] * p.grad[row];
    const float beta = p.beta == nullptr ? 0.0f : p.beta[row] * p.grad[row];
    V* cond = velocity_target<V>(p.grad_velocity, offset, s.out[0]);
    V* uncond = guided ? velocity_target<V>(p.grad_velocity_uncond, offset, s.out[1]) : nullptr;
    if (alpha == 0.0f && beta == 0.0f) {
      std::fill(cond, cond + n, V{});
      if (guided) std::fill(uncond, uncond + n, V{});
    } else {
      // A term without weight is left out, whatever its tensors hold.
      const float* prev = alpha == 0.0f ? nullptr : load_block(p.prev_sample, offset, n, s.in[3]);
      const V* ref = beta == 0.0f ? nullptr : load_velocity<V>(p.ref_velocity, offset, n, s.in[4]);
      policy_gradient(load_policy<V>(p.velocity, p.sample, p.coef, row, offset, n, s), alpha, prev,
                      beta, ref, cond, uncond);
    }
    store_velocity(cond, p.grad_velocity, offset, n);
    if (guided) store_velocity(uncond, p.grad_velocity_uncond, offset, n);
  });
}

}  // namespace

void sde_step_cpu(const SdeStepParams& p) {
  prefer_huge_pages({p.prev_sample, DType::kFloat32}, p.extent);
  prefer_huge_pages({p.mean, DType::kFloat32}, p.extent);
  RowSums squares(p.extent);
  with_velocity_type({p.velocity.cond, p.velocity.uncond},
                     [&](auto type) { step_blocks<decltype(type)>(p, squares); });
  for (int64_t row = 0; row < p.extent.rows; ++row) {
    p.log_prob[row] = log_prob_of(p.coef, row, squares.total(row), p.extent.row_size);
  }
}

void sde_log_prob_cpu(const SdeLogProbParams& p) {
  RowSums squares(p.extent);
  with_velocity_type({p.velocity.cond, p.velocity.uncond},
                     [&](auto type) { add_squares<decltype(type)>(p, squares); });
  for (int64_t row = 0; row < p.extent.rows; ++row) {
    p.log_prob[row] = log_prob_of(p.coef, row, squares.total(row), p.extent.row_size);
  }
}

void velocity_grad_cpu(const VelocityGradParams& p) {
  prefer_huge_pages(p.grad_velocity, p.extent);
  prefer_huge_pages(p.grad_velocity_uncond, p.extent);
  with_velocity_type({p.velocity.cond,
                      p.velocity.uncond,
                      p.ref_velocity,
                      {p.grad_velocity.data, p.grad_velocity.dtype},
                      {p.grad_velocity_uncond.data, p.grad_velocity_uncond.dtype}},
                     [&](auto type) { gradient_blocks<decltype(type)>(p); });
}

}  // namespace gardo
