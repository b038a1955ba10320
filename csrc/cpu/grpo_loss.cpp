#include "grpo_loss.h"

#include <algorithm>
#include <cmath>

#include "policy_block.h"

namespace gardo {
namespace {

using std::int64_t;

// NaN goes through, unlike with std::min and std::max.
float clamp(float value, float low, float high) {
  if (value < low) return low;
  return value > high ? high : value;
}

struct PolicyTerm {
  float loss;
  float gradient;  // d loss / d log_prob
};

PolicyTerm policy_term(float ratio, float advantage, const GrpoLossParams& p) {
  const float a = clamp(advantage, -p.adv_clip, p.adv_clip);
  // A sample without advantage must not turn an overflowing ratio into 0 * inf.
  if (a == 0.0f) return {0.0f, 0.0f};
  const float plain = -a * ratio;
  const float clipped = -a * clamp(ratio, p.clip_low, p.clip_high);
  if (clipped > plain) return {clipped, 0.0f};
  return {plain, plain};
}

template <typename V, typename Gated>
void add_sums(const GrpoLossParams& p, Gated gated, RowSums& squares, RowSums& kl_squares,
              RowSums& shifts) {
  for_each_block(
      p.extent, [&](int64_t row, int64_t offset, int64_t, int64_t n, int64_t block, Scratch& s) {
        const float* prev = load_block(p.prev_sample, offset, n, s.in[3]);
        const V* ref = gated(row) ? load_velocity<V>(p.ref_velocity, offset, n, s.in[4]) : nullptr;
        const bool guard = p.noise.data != nullptr;
        const float* noise = guard ? load_block(p.noise, offset, n, s.in[5]) : nullptr;
        const PolicySums sums =
            policy_sums(load_policy<V>(p.velocity, p.sample, p.coef, row, offset, n, s), prev, ref,
                        p.coef.c[row], noise);
        squares[block] = sums.residual;
        kl_squares[block] = sums.kl;
        shifts[block] = sums.shift;
      });
}

}  // namespace

void grpo_loss_cpu(const GrpoLossParams& p) {
  const int64_t rows = p.extent.rows;
  const auto gated = [&](int64_t row) {
    return p.ref_velocity.data != nullptr && (p.gate == nullptr || p.gate[row] != 0);
  };
  RowSums squares(p.extent), kl_squares(p.extent), shifts(p.extent);
  with_velocity_type({p.velocity.cond, p.velocity.uncond, p.ref_velocity}, [&](auto type) {
    add_sums<decltype(type)>(p, gated, squares, kl_squares, shifts);
  });

  int64_t num_gated = 0;
  for (int64_t row = 0; row < rows; ++row) num_gated += gated(row) ? 1 : 0;
  const double batch = static_cast<double>(std::max<int64_t>(rows, 1));
  const bool sum = p.reduction == Reduction::kSum;
  const double policy_rows = sum ? 1.0 : batch;
  const double kl_rows = p.reduction == Reduction::kGated
                             ? static_cast<double>(std::max<int64_t>(num_gated, 1))
                             : policy_rows;
  const double size = static_cast<double>(p.extent.row_size);
  double policy = 0.0, kl = 0.0;
  int64_t clipped = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const float log_prob = log_prob_of(p.coef, row, squares.total(row), p.extent.row_size);
    const bool guard = p.noise.data != nullptr;
    const float log_ratio =
        guard ? static_cast<float>(shifts.total(row) / size) : log_prob - p.old_log_prob[row];
    const float ratio = std::exp(log_ratio);
    const PolicyTerm term = policy_term(ratio, p.advantage[row], p);
    p.log_prob[row] = log_prob;
    p.ratio[row] = ratio;
    clipped += ratio < p.clip_low || ratio > p.clip_high ? 1 : 0;
    policy += term.loss;
    // d log_prob / dv = 2*scale*b/size * (prev - mean), or b/size * noise
    const double slope = (guard ? 1.0 : 2.0 * p.coef.scale[row]) * p.coef.b[row] / size;
    p.alpha[row] =
        term.gradient == 0.0f ? 0.0f : static_cast<float>(term.gradient * slope / policy_rows);
    p.beta[row] = 0.0f;
    if (gated(row)) {
      const double weight = p.coef.kl[row];
      kl += weight * kl_squares.total(row) / size;
      p.beta[row] = static_cast<float>(p.kl_coef * weight * 2.0 / (size * kl_rows));
    }
  }
  policy /= policy_rows;
  kl /= kl_rows;
  p.stats[0] = static_cast<float>(policy);
  p.stats[1] = static_cast<float>(kl);
  *p.loss = static_cast<float>(policy + p.kl_coef * kl);
  p.stats[2] = static_cast<float>(static_cast<double>(clipped) / batch);
}

}  // namespace gardo
