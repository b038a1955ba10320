// C++ tests of the core, for runs under AddressSanitizer and UndefinedBehaviorSanitizer
// (`make asan`). Values are checked against cases worked out by hand; the Python tests compare with
// the float64 reference. Every buffer is an exact-size heap block, so that a stray index is caught.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "shape_rewards.h"

namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what);
}

bool near(double a, double b) {
  return std::fabs(a - b) <= 1e-12;
}

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

}  // namespace

int main() {
  test_shape_rewards();
  if (failures != 0) return EXIT_FAILURE;
  std::puts("C++ tests passed");
  return EXIT_SUCCESS;
}
