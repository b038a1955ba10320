#include <cmath>
#include <limits>
#include <vector>

#include "nearest_neighbor.h"
#include "shape_rewards.h"
#include "testing.h"
#include "win_rate.h"

namespace {

using testing::expect;
using testing::near;

struct Rewards {
  std::vector<double> advantage, uncertainty;
  std::vector<std::uint8_t> gate;
  double threshold = -1.0;
  double mean_uncertainty = -1.0;
};

Rewards shape(const std::vector<double>& proxy, const std::vector<double>& aux,
              const std::vector<std::int64_t>& groups, const std::vector<double>& distance,
              double fraction, gardo::GateMode mode, gardo::RankScope scope) {
  const std::size_t n = proxy.size();
  Rewards out;
  out.advantage.resize(n);
  out.uncertainty.resize(n);
  out.gate.resize(n);
  gardo::ShapeRewardsParams p{};
  p.proxy = proxy.data();
  p.aux = aux.data();
  p.groups = groups.data();
  p.distance = distance.empty() ? nullptr : distance.data();
  p.num_samples = static_cast<std::int64_t>(n);
  p.num_aux = n == 0 ? 0 : static_cast<std::int64_t>(aux.size() / n);
  p.fraction = fraction;
  p.gate_mode = mode;
  p.scope = scope;
  p.num_threads = 2;
  p.advantage = out.advantage.data();
  p.uncertainty = out.uncertainty.data();
  p.gate = out.gate.data();
  p.threshold = &out.threshold;
  p.mean_uncertainty = &out.mean_uncertainty;
  gardo::shape_rewards_cpu(p);
  return out;
}

void test_shape_rewards() {
  using gardo::GateMode;
  using gardo::RankScope;
  const Rewards r = shape({0, 1, 1, 5}, {9, 2, 2, 1}, {7, 7, -3, -3}, {0.5, 1.5, 0.1, 0.3}, 0.5,
                          GateMode::kPaper, RankScope::kBatch);
  const double advantage[] = {-0.5, 0.75, -2.0, 3.0};
  const double uncertainty[] = {-1, 0, 0, 1};
  for (int i = 0; i < 4; ++i) {
    expect(near(r.advantage[i], advantage[i]), "shape_rewards: advantage");
    expect(near(r.uncertainty[i], uncertainty[i]), "shape_rewards: uncertainty");
    expect(r.gate[i] == (i == 3), "shape_rewards: gate");
  }
  expect(near(r.threshold, 0.0), "shape_rewards: threshold");

  for (const GateMode mode :
       {GateMode::kPaper, GateMode::kOfficial, GateMode::kAll, GateMode::kOff}) {
    for (const RankScope scope : {RankScope::kBatch, RankScope::kGroup}) {
      shape({}, {}, {}, {}, 0.1, mode, scope);
      shape({1}, {}, {0}, {}, 0.1, mode, scope);
      const double nan = std::numeric_limits<double>::quiet_NaN();
      const Rewards none = shape({nan, nan}, {0, 1}, {0, 0}, {1, 1}, 0.1, mode, scope);
      expect(none.gate[0] == 0 && none.advantage[0] == 0.0, "shape_rewards: all missing");
      std::vector<double> proxy(20000), aux(40000);
      std::vector<std::int64_t> groups(20000);
      for (int i = 0; i < 20000; ++i) {
        proxy[i] = i % 97 == 0 ? nan : std::sin(i);
        aux[i] = std::cos(i * 0.7);
        aux[20000 + i] = i % 5;
        groups[i] = (i * 7919) % 800;
      }
      const Rewards many = shape(proxy, aux, groups, {}, 0.1, mode, scope);
      double sum = 0.0;
      for (const double a : many.advantage) sum += a;
      expect(std::fabs(sum) < 1e-9, "shape_rewards: advantages sum to 0 without distances");
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
  test_shape_rewards();
  test_win_rate();
  test_nearest_neighbor();
}
