#include "nft_loss.h"

#include <algorithm>

#include "blocks.h"
#include "huge_pages.h"
#include "lanes.h"

namespace gardo {
namespace {

using std::int64_t;

constexpr double kWeightFloor = 1e-5;

// A block of one row, with velocities of type V (float or BFloat16). Passed by value, as
// PolicyBlock is.
template <typename V>
struct NftBlock {
  const V *v, *v_old;
  const float *x0, *xt;
  float t, beta, one_minus_beta, one_plus_beta;
  std::int64_t n;
};

// Uses the first four inputs of the scratch.
template <typename V>
NftBlock<V> load_nft(const NftTensors& t, int64_t row, int64_t offset, int64_t n, Scratch& s) {
  return {load_velocity<V>(t.velocity, offset, n, s.in[0]),
          load_velocity<V>(t.old_velocity, offset, n, s.in[1]),
          load_block(t.x0, offset, n, s.in[2]),
          load_block(t.xt, offset, n, s.in[3]),
          t.t[row],
          static_cast<float>(t.beta),
          static_cast<float>(1.0 - t.beta),
          static_cast<float>(1.0 + t.beta),
          n};
}

template <typename T>
struct Errors {
  T v, positive, negative;
};

template <typename T, typename V>
GARDO_INLINE inline Errors<T> errors_of(const NftBlock<V>& b, int64_t i) {
  const T v = load_lanes<T>(b.v + i), v_old = load_lanes<T>(b.v_old + i);
  const T x0 = load_lanes<T>(b.x0 + i), xt = load_lanes<T>(b.xt + i);
  return {v, (xt - b.t * (b.beta * v + b.one_minus_beta * v_old)) - x0,
          (xt - b.t * (b.one_plus_beta * v_old - b.beta * v)) - x0};
}

struct NftSums {
  double squares_positive, abs_positive, squares_negative, abs_negative;
  double kl;  // of (v - ref)^2; 0 without ref
};

// `ref` may be null.
template <typename V>
GARDO_INLINE inline NftSums sums(NftBlock<V> block, const V* ref) {
  // Two vectors of each of the sums: more would not fit into the registers.
  constexpr int kVectors = 2;
  double totals[5] = {}, without_kl[4];
  const auto terms = [&](int64_t i, auto* out) GARDO_INLINE {
    using T = std::remove_pointer_t<decltype(out)>;
    const Errors<T> e = errors_of<T>(block, i);
    out[0] = e.positive * e.positive;
    out[1] = abs_lanes(e.positive);
    out[2] = e.negative * e.negative;
    out[3] = abs_lanes(e.negative);
    return e.v;
  };
  if (ref == nullptr) {
    sum_lanes<kVectors>(block.n, without_kl, terms);
    std::copy(without_kl, without_kl + 4, totals);
  } else {
    sum_lanes<kVectors>(block.n, totals, [&](int64_t i, auto* out) GARDO_INLINE {
      using T = std::remove_pointer_t<decltype(out)>;
      const T d = terms(i, out) - load_lanes<T>(ref + i);
      out[4] = d * d;
    });
  }
  return {totals[0], totals[1], totals[2], totals[3], totals[4]};
}

// `ref` may be null.
template <typename V>
GARDO_INLINE inline void gradient(NftBlock<V> block, float by_positive, float by_negative,
                                  float by_kl, const V* ref, V* grad) {
  with_flag(ref != nullptr, [&](auto with_kl) GARDO_INLINE {
    for_lanes(block.n, [&](auto lanes, int64_t i) GARDO_INLINE {
      using T = decltype(lanes);
      const Errors<T> e = errors_of<T>(block, i);
      T sum = by_positive * e.positive + by_negative * e.negative;
      if constexpr (decltype(with_kl)::value) sum += by_kl * (e.v - load_lanes<T>(ref + i));
      store_lanes(sum, grad + i);
    });
  });
}

GARDO_CLONES NftSums nft_sums(NftBlock<float> block, const float* ref) {
  return sums(block, ref);
}

GARDO_CLONES NftSums nft_sums(NftBlock<BFloat16> block, const BFloat16* ref) {
  return sums(block, ref);
}

GARDO_CLONES void nft_gradient(NftBlock<float> block, float by_positive, float by_negative,
                               float by_kl, const float* ref, float* grad) {
  gradient(block, by_positive, by_negative, by_kl, ref, grad);
}

GARDO_CLONES void nft_gradient(NftBlock<BFloat16> block, float by_positive, float by_negative,
                               float by_kl, const BFloat16* ref, BFloat16* grad) {
  gradient(block, by_positive, by_negative, by_kl, ref, grad);
}

template <typename V>
void gradient_blocks(const NftGradParams& p) {
  const NftTensors& t = p.tensors;
  for_each_block<Order::kBackward>(t.extent, [&](int64_t row, int64_t offset, int64_t, int64_t n,
                                                 int64_t, Scratch& s) {
    const float by_kl = t.ref_velocity.data == nullptr ? 0.0f : p.weights[2 * t.extent.rows + row];
    const V* ref = by_kl == 0.0f ? nullptr : load_velocity<V>(t.ref_velocity, offset, n, s.in[4]);
    V* grad = velocity_target<V>(p.grad_velocity, offset, s.out[0]);
    nft_gradient(load_nft<V>(t, row, offset, n, s), p.weights[row], p.weights[t.extent.rows + row],
                 by_kl, ref, grad);
    store_velocity(grad, p.grad_velocity, offset, n);
  });
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
  with_velocity_type({t.velocity, t.old_velocity, t.ref_velocity}, [&](auto type) {
    using V = decltype(type);
    for_each_block(t.extent, [&](int64_t row, int64_t offset, int64_t, int64_t n, int64_t block,
                                 Scratch& s) {
      const V* ref = gated(row) ? load_velocity<V>(t.ref_velocity, offset, n, s.in[4]) : nullptr;
      const NftSums sums = nft_sums(load_nft<V>(t, row, offset, n, s), ref);
      squares_p[block] = sums.squares_positive;
      abs_p[block] = sums.abs_positive;
      squares_n[block] = sums.squares_negative;
      abs_n[block] = sums.abs_negative;
      kl_squares[block] = sums.kl;
    });
  });

  const int64_t rows = t.extent.rows;
  int64_t num_gated = 0;
  for (int64_t row = 0; row < rows; ++row) num_gated += gated(row) ? 1 : 0;
  const bool sum = p.reduction == NftReduction::kSum;
  const double batch = sum ? 1.0 : static_cast<double>(std::max<int64_t>(rows, 1));
  const double kl_rows = sum ? 1.0 : static_cast<double>(std::max<int64_t>(num_gated, 1));
  const double size = static_cast<double>(t.extent.row_size);
  double policy = 0.0, kl = 0.0;
  for (int64_t row = 0; row < rows; ++row) {
    const double r = clamp01(static_cast<double>(p.advantage[row]) / (2.0 * p.adv_clip) + 0.5);
    const SignTerm positive = sign_term(squares_p.total(row), abs_p.total(row), size);
    const SignTerm negative = sign_term(squares_n.total(row), abs_n.total(row), size);
    policy += p.adv_clip * (r * positive.loss + (1.0 - r) * negative.loss) / t.beta;
    // d e+/dv = -t*beta, d e-/dv = t*beta; the 1/beta of the loss cancels.
    const double per_sign = p.adv_clip * static_cast<double>(t.t[row]) / batch;
    p.weights[row] = static_cast<float>(-per_sign * r * positive.slope);
    p.weights[rows + row] = static_cast<float>(per_sign * (1.0 - r) * negative.slope);
    p.weights[2 * rows + row] = 0.0f;
    if (gated(row)) {
      kl += kl_squares.total(row) / size;
      p.weights[2 * rows + row] = static_cast<float>(p.kl_coef * 2.0 / (size * kl_rows));
    }
  }
  policy /= batch;
  kl /= kl_rows;
  p.stats[0] = static_cast<float>(policy);
  p.stats[1] = static_cast<float>(kl);
  *p.loss = static_cast<float>(policy + p.kl_coef * kl);
}

void nft_grad_cpu(const NftGradParams& p) {
  prefer_huge_pages(p.grad_velocity, p.tensors.extent);
  const NftTensors& t = p.tensors;
  with_velocity_type(
      {t.velocity, t.old_velocity, t.ref_velocity, {p.grad_velocity.data, p.grad_velocity.dtype}},
      [&](auto type) { gradient_blocks<decltype(type)>(p); });
}

}  // namespace gardo
