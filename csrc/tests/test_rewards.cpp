#include <cmath>
#include <limits>
#include <vector>

#include "cap_rewards.h"
#include "gate_samples.h"
#include "group_advantages.h"
#include "nearest_neighbor.h"
#include "testing.h"
#include "win_rate.h"

namespace {

using testing::expect;
using testing::near;

using gardo::RankScope;
using gardo::ShareOf;
using gardo::Side;
using gardo::Ties;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::vector<double> advantages(const std::vector<double>& proxy,
                               const std::vector<std::int64_t>& groups,
                               const std::vector<double>& distance, gardo::AdvantageNorm norm,
                               gardo::DiversityScale scale) {
  std::vector<double> advantage(proxy.size());
  gardo::group_advantages_cpu(
      {proxy.data(), groups.data(), distance.empty() ? nullptr : distance.data(),
       static_cast<std::int64_t>(proxy.size()), norm, scale, 2, advantage.data()});
  return advantage;
}

void test_group_advantages() {
  using gardo::AdvantageNorm;
  using gardo::DiversityScale;
  const std::vector<double> proxy = {0, 1, 1, 5, kNan}, distance = {0.5, 1.5, 0.1, 0.3, 1};
  const std::vector<std::int64_t> groups = {7, 7, -3, -3, 7};
  const double relative[] = {-0.5, 0.75, -2.0, 3.0, 0.0}, raw[] = {-0.5, 0.75, -2.0, 0.6, 0.0};
  const auto by_mean =
      advantages(proxy, groups, distance, AdvantageNorm::kNone, DiversityScale::kGroupMean);
  const auto as_is =
      advantages(proxy, groups, distance, AdvantageNorm::kNone, DiversityScale::kRaw);
  for (int i = 0; i < 5; ++i) {
    expect(near(by_mean[i], relative[i]), "group_advantages: group_mean");
    expect(near(as_is[i], raw[i]), "group_advantages: raw");
  }
  for (const auto norm :
       {AdvantageNorm::kNone, AdvantageNorm::kGroupStd, AdvantageNorm::kGlobalStd}) {
    advantages({}, {}, {}, norm, DiversityScale::kGroupMean);
    expect(advantages({kNan}, {0}, {}, norm, DiversityScale::kRaw)[0] == 0.0,
           "group_advantages: missing");
    std::vector<double> many(20000);
    std::vector<std::int64_t> ids(20000);
    for (int i = 0; i < 20000; ++i) {
      many[i] = i % 97 == 0 ? kNan : std::sin(i);
      ids[i] = (i * 7919) % 800;
    }
    double sum = 0.0;
    for (const double a : advantages(many, ids, {}, norm, DiversityScale::kRaw)) sum += a;
    expect(std::fabs(sum) < 1e-9, "group_advantages: sum to 0 without distances");
  }
}

struct Gated {
  std::vector<double> uncertainty, threshold;
  std::vector<std::uint8_t> gate;
  double mean = -1.0;
};

Gated gate(const std::vector<double>& proxy, const std::vector<double>& aux,
           const std::vector<std::int64_t>& groups, gardo::GateSamplesParams p) {
  const std::size_t n = proxy.size();
  Gated out;
  out.uncertainty.resize(n);
  out.threshold.resize(gardo::has_group_thresholds(p) ? n : 1);
  out.gate.resize(n);
  p.proxy = proxy.data();
  p.aux = aux.data();
  p.groups = groups.data();
  p.num_samples = static_cast<std::int64_t>(n);
  p.num_aux = n == 0 ? 0 : static_cast<std::int64_t>(aux.size() / n);
  p.num_threads = 2;
  p.uncertainty = out.uncertainty.data();
  p.gate = out.gate.data();
  p.threshold = out.threshold.data();
  p.mean_uncertainty = &out.mean;
  gardo::gate_samples_cpu(p);
  return out;
}

void test_gate_samples() {
  gardo::GateSamplesParams p{};
  p.fraction = 0.5;
  p.share_of = ShareOf::kNonnegative;
  const std::vector<std::int64_t> groups = {7, 7, -3, -3};
  const Gated r = gate({0, 1, 1, 5}, {9, 2, 2, 1}, groups, p);
  const double uncertainty[] = {-1, 0, 0, 1};
  for (int i = 0; i < 4; ++i) {
    expect(near(r.uncertainty[i], uncertainty[i]), "gate_samples: uncertainty");
    expect(r.gate[i] == (i == 3), "gate_samples: gate");
  }
  expect(near(r.threshold[0], 0.0) && near(r.mean, 1.0 / 3), "gate_samples: threshold");

  for (int options = 0; options < 24; ++options) {
    p.side = static_cast<Side>(options & 1);
    p.share_of = static_cast<ShareOf>(options >> 1 & 1);
    p.scope = static_cast<RankScope>(options >> 2 & 1);
    p.ties = static_cast<Ties>(options / 8);
    gate({}, {}, {}, p);
    gate({1}, {}, {0}, p);
    const Gated none = gate({kNan, kNan}, {0, 1}, {0, 0}, p);
    expect(none.gate[0] == 0 && none.uncertainty[0] == 0.0, "gate_samples: all missing");
    std::vector<double> proxy(20000), aux(40000);
    std::vector<std::int64_t> ids(20000);
    for (int i = 0; i < 20000; ++i) {
      proxy[i] = i % 97 == 0 ? kNan : std::sin(i);
      aux[i] = std::cos(i * 0.7);
      aux[20000 + i] = i % 5;
      ids[i] = (i * 7919) % 800;
    }
    double sum = 0.0;
    const Gated all = gate(proxy, aux, ids, p);
    for (const double u : all.uncertainty) sum += u;
    if (p.ties != Ties::kStrict) {
      expect(std::fabs(sum) < 1e-6, "gate_samples: the uncertainties of all samples cancel");
    } else if (p.share_of == ShareOf::kAll) {
      const double valid = 20000 - 207;  // ties in the second auxiliary reward raise U
      expect(near(all.mean, sum / valid, 1e-9) && sum > 900, "gate_samples: mean of strict wins");
    }
  }
}

void test_win_rate() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<double> rewards = {1, 2, 2, nan, 5, 3, 3, 3, 3, 3};
  const std::vector<std::int64_t> groups = {4, 4, 4, 4, -4};
  std::vector<double> rate(10);
  gardo::win_rate_cpu({rewards.data(), groups.data(), 2, 5, 2, rate.data()});
  const double want[] = {0, 0.75, 0.75, nan, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5};
  for (int i = 0; i < 10; ++i) {
    expect(i == 3 ? std::isnan(rate[i]) : near(rate[i], want[i]), "win_rate");
  }
  gardo::win_rate_cpu({rewards.data(), nullptr, 0, 5, 1, nullptr});
}

void test_cap_rewards() {
  const double inf = std::numeric_limits<double>::infinity();
  // A pool of three of four; the auxiliary rewards beat 0, 1.5, 3 of it.
  const std::vector<double> proxy = {9, 9, 9, 0.5, kNan, 9}, aux = {0, 2, 4, 2, 2, -inf};
  const std::vector<double> pool = {1, 2, 6, inf, 1, 2, 3, inf};
  std::vector<double> capped(6);
  gardo::CapRewardsParams p{proxy.data(), aux.data(), pool.data(), 6, 1, 4, 0.25, 2, capped.data()};
  gardo::cap_rewards_cpu(p);
  const double want[] = {1.5, 4, 9, 0.5, kNan, kNan};
  for (int i = 0; i < 6; ++i) {
    expect(std::isnan(want[i]) ? std::isnan(capped[i]) : near(capped[i], want[i]), "cap_rewards");
  }
  p.tau = -2.0;
  gardo::cap_rewards_cpu(p);
  expect(near(capped[2], 1.0) && near(capped[3], 0.5), "cap_rewards: level below 0");
  p.tau = kNan;
  gardo::cap_rewards_cpu(p);
  expect(std::isnan(capped[2]), "cap_rewards: no tau");
  const std::vector<double> none = {inf, inf, inf, inf};
  p.tau = 0.25;
  p.pool = none.data();
  p.pool_size = 2;
  gardo::cap_rewards_cpu(p);
  for (const double value : capped) expect(std::isnan(value), "cap_rewards: no pool");
  p.num_samples = 0;
  gardo::cap_rewards_cpu(p);
  std::vector<double> many(5000, 1.0), own(5000);  // several threads
  const std::vector<double> one = {-3, 1};
  gardo::cap_rewards_cpu({many.data(), many.data(), one.data(), 5000, 1, 1, 0.0, 2, own.data()});
  for (const double value : own) expect(value == -3.0, "cap_rewards: a pool of one");
}

// Sizes around the tiles, the blocks and the switch to shared-out groups; every dtype.
void test_nearest_neighbor() {
  for (const std::int64_t n : {0, 1, 2, 3, 4, 5, 13, 24, 300}) {
    for (const std::int64_t dim : {1, 8, 13, 1024, 1030}) {
      std::vector<float> features(n * dim);
      std::vector<std::uint16_t> bfloats(n * dim);
      for (std::int64_t i = 0; i < n * dim; ++i) {
        features[i] = static_cast<float>(std::sin(0.1 * static_cast<double>(i)));
        bfloats[i] = static_cast<std::uint16_t>(0x3f80 + i % 100);
      }
      if (n > 4) features[2 * dim] = std::numeric_limits<float>::infinity();
      if (n > 4) std::fill(&features[3 * dim], &features[3 * dim] + dim, 0.0f);
      const std::vector<std::int64_t> groups(n, 9);
      std::vector<float> distance(n);
      for (const auto type : {gardo::DType::kFloat32, gardo::DType::kBFloat16}) {
        const void* data = type == gardo::DType::kFloat32 ? static_cast<void*>(features.data())
                                                          : static_cast<void*>(bfloats.data());
        gardo::nearest_neighbor_cpu({{data, type}, groups.data(), n, dim, n, 2, distance.data()});
        for (std::int64_t i = 0; i < n; ++i) {
          const bool missing = n > 4 && i == 2 && type == gardo::DType::kFloat32;
          expect(missing ? std::isnan(distance[i]) : distance[i] >= 0.0f && distance[i] <= 2.0f,
                 "nearest_neighbor: range");
        }
      }
    }
  }
  const std::vector<float> features = {2, 0, 0, 3, 5, 5};
  const std::vector<std::int64_t> groups = {1, 1, 1};
  std::vector<float> distance(3, -1.0f);
  const auto of_at_most = [&](std::int64_t max_group) {
    return gardo::nearest_neighbor_cpu({{features.data(), gardo::DType::kFloat32},
                                        groups.data(),
                                        3,
                                        2,
                                        max_group,
                                        1,
                                        distance.data()});
  };
  expect(!of_at_most(2) && distance[0] == -1.0f, "nearest_neighbor: too large a group");
  expect(of_at_most(3), "nearest_neighbor: a group that is not too large");
  for (const float d : distance) expect(near(d, 1 - std::sqrt(0.5), 1e-6), "nearest_neighbor");
}

}  // namespace

void test_rewards() {
  test_group_advantages();
  test_gate_samples();
  test_win_rate();
  test_cap_rewards();
  test_nearest_neighbor();
}
