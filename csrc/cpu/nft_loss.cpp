#include "nft_loss.h"

#include <algorithm>

#include "blocks.h"
#include "huge_pages.h"

namespace gardo {
namespace {

using std::int64_t;

constexpr double kWeightFloor = 1e-5;

// e+ into `positive`, e- into `negative`. Uses scratch x, y, w, q, r; returns the velocity (in x).
const float* errors(const NftTensors& t, int64_t row, int64_t offset, int64_t n, Scratch& s,
                    float* positive, float* negative) {
  const float* v = load_block(t.velocity, offset, n, s.x);
  const float* v_old = load_block(t.old_velocity, offset, n, s.y);
  const float* x0 = load_block(t.x0, offset, n, s.w);
  const float* xt = load_block(t.xt, offset, n, s.q);
  const auto beta = static_cast<float>(t.beta);
  affine(beta, v, static_cast<float>(1.0 - t.beta), v_old, n, s.r);
  denoising_error(xt, t.t[row], s.r, x0, n, positive);
  affine(static_cast<float>(1.0 + t.beta), v_old, -beta, v, n, s.r);
  denoising_error(xt, t.t[row], s.r, x0, n, negative);
  return v;
}

struct SignTerm {
  double loss;   // mean(e^2) / w
  double slope;  // d loss / d e = slope * e
};

SignTerm sign_term(double squares, double absolutes, double size) {
  // NaN must stay NaN, which std::max(floor, NaN) would turn into the floor.
  const double mean_abs = absolutes / size;
  const double weight = mean_abs < kWeightFloor ? kWeightFloor : mean_abs;
  return {squares / size / weight, 2.0 / (size * weight)};
}

double clamp01(double value) {
  if (value < 0.0) return 0.0;
  return value > 1.0 ? 1.0 : value;
}

}  // namespace

void nft_loss_cpu(const NftLossParams& p) {
  const NftTensors& t = p.tensors;
  const auto gated = [&](int64_t row) {
    return t.ref_velocity.data != nullptr && (p.gate == nullptr || p.gate[row] != 0);
  };
  RowSums squares_p(t.extent), squares_n(t.extent), abs_p(t.extent), abs_n(t.extent);
  RowSums kl_squares(t.extent);
  for_each_block(t.extent, [&](int64_t row, int64_t offset, int64_t, int64_t n, int64_t block,
                               Scratch& s) {
    const float* v = errors(t, row, offset, n, s, s.p, s.v);
    squares_p[block] = sum_squares(s.p, n);
    abs_p[block] = sum_abs(s.p, n);
    squares_n[block] = sum_squares(s.v, n);
    abs_n[block] = sum_abs(s.v, n);
    if (gated(row)) {
      kl_squares[block] = sum_squared_difference(v, load_block(t.ref_velocity, offset, n, s.w), n);
    }
  });

  const int64_t rows = t.extent.rows;
  int64_t num_gated = 0;
  for (int64_t row = 0; row < rows; ++row) num_gated += gated(row) ? 1 : 0;
  const double batch = static_cast<double>(std::max<int64_t>(rows, 1));
  const double kl_rows = static_cast<double>(std::max<int64_t>(num_gated, 1));
  const double size = static_cast<double>(t.extent.row_size);
  double policy = 0.0, kl = 0.0;
  for (int64_t row = 0; row < rows; ++row) {
    const double r = clamp01(static_cast<double>(p.advantage[row]) / (2.0 * p.adv_clip) + 0.5);
    const SignTerm positive = sign_term(squares_p.total(row), abs_p.total(row), size);
    const SignTerm negative = sign_term(squares_n.total(row), abs_n.total(row), size);
    policy += p.adv_clip * (r * positive.loss + (1.0 - r) * negative.loss) / t.beta;
    // d e+/dv = -t*beta, d e-/dv = t*beta; the 1/beta of the loss cancels.
    const double per_sign = p.adv_clip * static_cast<double>(t.t[row]) / batch;
    p.grad_positive[row] = static_cast<float>(-per_sign * r * positive.slope);
    p.grad_negative[row] = static_cast<float>(per_sign * (1.0 - r) * negative.slope);
    p.grad_kl[row] = 0.0f;
    if (gated(row)) {
      kl += kl_squares.total(row) / size;
      p.grad_kl[row] = static_cast<float>(p.kl_coef * 2.0 / (size * kl_rows));
    }
  }
  policy /= batch;
  kl /= kl_rows;
  *p.policy_loss = static_cast<float>(policy);
  *p.kl = static_cast<float>(kl);
  *p.loss = static_cast<float>(policy + p.kl_coef * kl);
}

void nft_backward_cpu(const NftBackwardParams& p) {
  prefer_huge_pages(p.grad_velocity, p.tensors.extent);
  const NftTensors& t = p.tensors;
  for_each_block<Order::kBackward>(
      t.extent, [&](int64_t row, int64_t offset, int64_t, int64_t n, int64_t, Scratch& s) {
        const float* v = errors(t, row, offset, n, s, s.p, s.v);
        float* grad = block_target(p.grad_velocity, offset, s.r);
        affine(p.grad_positive[row], s.p, p.grad_negative[row], s.v, n, grad);
        if (t.ref_velocity.data != nullptr && p.grad_kl[row] != 0.0f) {
          const float* ref = load_block(t.ref_velocity, offset, n, s.w);
          add_scaled_difference(p.grad_kl[row], v, ref, n, grad);
        }
        store_block(grad, p.grad_velocity, offset, n);
      });
}

}  // namespace gardo
