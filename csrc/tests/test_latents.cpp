#include <cmath>
#include <limits>
#include <vector>

#include "../cpu/blocks.h"
#include "../cpu/noise.h"
#include "grpo_loss.h"
#include "nft_loss.h"
#include "sde_step.h"
#include "testing.h"

namespace {

using gardo::ConstLatents;
using gardo::DType;
using gardo::Latents;
using std::int64_t;
using testing::expect;
using testing::near;

// B rows of latents in any dtype, in a block of exactly their size.
struct Tensor {
  DType dtype;
  std::vector<float> wide;
  std::vector<std::uint16_t> narrow;

  Tensor(int64_t size, DType type, double phase = 0.0) : dtype(type) {
    for (int64_t i = 0; i < size; ++i) {
      const auto value = static_cast<float>(std::sin(phase + 0.37 * static_cast<double>(i)));
      if (type == DType::kFloat32) wide.push_back(value);
      // Between 1 and 2 in float16, and small numbers in bfloat16.
      if (type != DType::kFloat32) narrow.push_back(static_cast<std::uint16_t>(0x3c00 + i % 512));
    }
  }

  void* data() {
    return dtype == DType::kFloat32 ? static_cast<void*>(wide.data())
                                    : static_cast<void*>(narrow.data());
  }
  ConstLatents in() { return {data(), dtype}; }
  Latents out() { return {data(), dtype}; }
};

constexpr ConstLatents kNone{nullptr, DType::kFloat32};

void run(int64_t rows, int64_t row_size, DType dtype, bool guided, bool seeded) {
  const int64_t size = rows * row_size;
  const gardo::Extent extent{rows, row_size, 2};
  Tensor v(size, dtype, 1), u(size, dtype, 2), x(size, DType::kFloat32, 3);
  Tensor z(size, DType::kFloat32, 4), ref(size, dtype, 5), prev(size, DType::kFloat32);
  const gardo::Velocity velocity{v.in(), guided ? u.in() : kNone, guided ? 4.5f : 1.0f};
  const std::vector<float> values(rows, 0.5f);
  const gardo::RowScalar scalar{values.data(), 1};
  const gardo::SdeCoefficients coef{scalar, scalar, scalar, scalar, scalar, scalar};
  const int64_t seed = -5;
  std::vector<float> mean(size), log_prob(rows), again(rows), ratio(rows), alpha(rows), beta(rows);
  gardo::sde_step_cpu({extent, velocity, x.in(), coef, seeded ? kNone : z.in(),
                       seeded ? &seed : nullptr, prev.wide.data(), mean.data(), log_prob.data()});
  gardo::sde_log_prob_cpu({extent, velocity, x.in(), prev.in(), coef, again.data()});
  for (int64_t i = 0; i < rows; ++i) {
    expect(log_prob[i] == again[i] && std::isfinite(log_prob[i]), "log_prob: equal bits");
  }

  std::vector<std::uint8_t> gate(rows);
  for (int64_t i = 0; i < rows; ++i) gate[i] = i % 2;
  float loss = -1, stats[] = {-1, -1, -1};
  gardo::GrpoLossParams grpo{};
  grpo.extent = extent;
  grpo.velocity = velocity;
  grpo.sample = x.in();
  grpo.prev_sample = prev.in();
  grpo.ref_velocity = ref.in();
  grpo.coef = coef;
  grpo.old_log_prob = log_prob.data();
  grpo.advantage = values.data();
  grpo.gate = gate.data();
  grpo.clip_low = 0.9f;
  grpo.clip_high = 1.1f;
  grpo.adv_clip = 5.0f;
  grpo.kl_coef = 0.1f;
  grpo.loss = &loss;
  grpo.stats = stats;
  grpo.log_prob = again.data();
  grpo.ratio = ratio.data();
  grpo.alpha = alpha.data();
  grpo.beta = beta.data();
  gardo::grpo_loss_cpu(grpo);
  for (int64_t i = 0; i < rows; ++i) expect(ratio[i] == 1.0f, "grpo_loss: ratio is exactly 1");
  const float policy = stats[0], kl = stats[1], clipped = stats[2];
  const float mean_loss = loss;
  // With ratio 1 and all advantages 0.5 the policy loss is -0.5.
  expect(near(policy, rows == 0 ? 0.0 : -0.5) && clipped == 0.0f, "grpo_loss: policy");
  expect(near(loss, policy + 0.1 * kl, 1e-5), "grpo_loss: sum");
  grpo.reduction = gardo::Reduction::kSum;
  grpo.noise = z.in();
  gardo::grpo_loss_cpu(grpo);
  expect(near(stats[0], -0.5 * static_cast<double>(rows), seeded ? INFINITY : 1e-5),
         "grpo_loss: the sum, with the noise of the step");
  grpo.reduction = gardo::Reduction::kGated;
  grpo.noise = kNone;
  gardo::grpo_loss_cpu(grpo);
  expect(loss == mean_loss, "grpo_loss: the mean again");

  Tensor grad(size, dtype), grad_uncond(size, dtype);
  gardo::velocity_grad_cpu({extent, velocity, x.in(), prev.in(), ref.in(), coef, alpha.data(),
                            beta.data(), scalar, grad.out(),
                            guided ? grad_uncond.out() : Latents{nullptr, dtype}});

  const gardo::NftTensors nft{extent, v.in(), u.in(), x.in(), z.in(), ref.in(), scalar, 0.7};
  std::vector<float> weights(3 * rows);
  gardo::nft_loss_cpu({nft, values.data(), gate.data(), 5.0f, 0.1f, gardo::NftReduction::kMean,
                       &loss, stats, weights.data()});
  expect(std::isfinite(loss) && loss >= 0.0f, "nft_loss: finite");
  gardo::nft_grad_cpu({nft, weights.data(), grad.out()});
}

// One element worked out by hand: mean = 2*3 + 0.5*4 = 8, prev = 8 + 0.1*10 = 9,
// log_prob = 7 - 2*(9 - 8)^2 = 5; with guidance 3 and unconditional 1: v = 1 + 3*(4 - 1) = 10.
void test_by_hand() {
  const float a = 2, b = 0.5, c = 0.1f, scale = 2, offset = 7, v = 4, u = 1, x = 3, z = 10;
  const auto in = [](const float& value) { return ConstLatents{&value, DType::kFloat32}; };
  const gardo::SdeCoefficients coef{{&a, 0}, {&b, 0}, {&c, 0}, {&scale, 0}, {&offset, 0}, {&c, 0}};
  float prev = 0, mean = 0, log_prob = 0;
  gardo::sde_step_cpu(
      {{1, 1, 1}, {in(v), kNone, 1.0f}, in(x), coef, in(z), nullptr, &prev, &mean, &log_prob});
  expect(near(mean, 8) && near(prev, 9, 1e-6) && near(log_prob, 5, 1e-5), "sde_step: by hand");
  gardo::sde_step_cpu(
      {{1, 1, 1}, {in(v), in(u), 3.0f}, in(x), coef, in(z), nullptr, &prev, &mean, &log_prob});
  expect(near(mean, 11), "sde_step: guidance by hand");
  const float alpha = 1.5f, upstream = 2;
  float grad = 0, grad_uncond = 0;
  gardo::velocity_grad_cpu({{1, 1, 1},
                            {in(v), in(u), 3.0f},
                            in(x),
                            in(prev),
                            kNone,
                            coef,
                            &alpha,
                            nullptr,
                            {&upstream, 0},
                            {&grad, DType::kFloat32},
                            {&grad_uncond, DType::kFloat32}});
  expect(near(grad, 9, 1e-5) && near(grad_uncond, -6, 1e-5), "velocity_grad: by hand");
}

// The index path of 3 * (2^32 + 5) elements, without the memory: every block is visited once, at
// the right place.
void test_indices_beyond_32_bits() {
  const gardo::Extent extent{3, (int64_t{1} << 32) + 5, 2};
  const int64_t per_row = gardo::blocks_per_row(extent);
  std::vector<std::uint8_t> visited(static_cast<std::size_t>(3 * per_row));
  gardo::for_each_block(extent, [&](int64_t row, int64_t offset, int64_t element, int64_t n,
                                    int64_t block, gardo::Scratch&) {
    const bool last = element + n == extent.row_size;
    const bool ok = offset == row * extent.row_size + element && block / per_row == row &&
                    element == block % per_row * gardo::kBlock && n == (last ? 5 : gardo::kBlock);
    visited[static_cast<std::size_t>(block)] += ok ? 1 : 2;
  });
  bool once = true;
  for (const std::uint8_t count : visited) once = once && count == 1;
  expect(once, "for_each_block: 64-bit indices");
}

// The noise counter carries from its low into its high word.
void test_noise_counter_carries() {
  constexpr int64_t kWords = int64_t{1} << 32;
  float across[16], beyond[8], start[8];
  gardo::philox_normal(7, 1, 4 * (kWords - 2), 16, across);
  gardo::philox_normal(7, 1, 4 * kWords, 8, beyond);
  gardo::philox_normal(7, 1, 0, 8, start);
  bool carried = true, repeated = true;
  for (int i = 0; i < 8; ++i) {
    carried = carried && across[8 + i] == beyond[i];
    repeated = repeated && beyond[i] == start[i];
  }
  expect(carried && !repeated, "philox_normal: 64-bit counter");
}

}  // namespace

void test_latents() {
  test_by_hand();
  test_indices_beyond_32_bits();
  test_noise_counter_carries();
  for (const int64_t rows : {0, 1, 3}) {
    for (const int64_t row_size : {1, 5, 31, 1024, 1027, 9000}) {
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        for (const bool guided : {false, true}) {
          for (const bool seeded : {false, true}) run(rows, row_size, dtype, guided, seeded);
        }
      }
    }
  }
}
