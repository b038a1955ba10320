// Runs the CUDA kernels on the CPU (see cuda_shim/) and compares them with the CPU kernels, which
// the Python tests compare with the float64 reference.
#include "../cuda/shape_rewards.cu"
#include "../cuda/win_rate.cu"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

namespace {

using gardo::AdvantageNorm;
using gardo::GateMode;
using gardo::RankScope;

struct Case {
  std::vector<double> proxy, aux, distance;
  std::vector<std::int64_t> groups;
};

Case random_case(std::int64_t n, std::int64_t num_aux, std::int64_t num_groups, unsigned seed) {
  std::mt19937_64 rng(seed);
  const auto draw = [&](int levels) {
    if (rng() % 16 == 0) return std::numeric_limits<double>::quiet_NaN();
    return static_cast<double>(static_cast<int>(rng() % (2 * levels)) - levels) / 8;  // many ties
  };
  Case c;
  for (std::int64_t i = 0; i < n; ++i) c.proxy.push_back(draw(40));
  for (std::int64_t i = 0; i < n * num_aux; ++i) c.aux.push_back(draw(20));
  for (std::int64_t i = 0; i < n; ++i) {
    c.groups.push_back(static_cast<std::int64_t>(rng() % num_groups) * (std::int64_t{1} << 40) -
                       (std::int64_t{1} << 41));
    c.distance.push_back(c.groups.back() > 0 ? static_cast<double>(rng() % 100) / 50 : 0.0);
  }
  return c;
}

struct Result {
  std::vector<double> advantage, uncertainty;
  std::vector<std::uint8_t> gate;
  double threshold = std::nan(""), mean_uncertainty = std::nan("");
};

gardo::ShapeRewardsParams bind(const Case& c, Result& r) {
  const std::size_t n = c.proxy.size();
  r.advantage.assign(n, std::nan(""));
  r.uncertainty.assign(n, std::nan(""));
  r.gate.assign(n, 77);
  gardo::ShapeRewardsParams p{};
  p.proxy = c.proxy.data();
  p.aux = c.aux.data();
  p.groups = c.groups.data();
  p.distance = c.distance.data();
  p.num_samples = static_cast<std::int64_t>(n);
  p.num_aux = n == 0 ? 0 : static_cast<std::int64_t>(c.aux.size() / n);
  p.num_threads = 1;
  p.advantage = r.advantage.data();
  p.uncertainty = r.uncertainty.data();
  p.gate = r.gate.data();
  p.threshold = &r.threshold;
  p.mean_uncertainty = &r.mean_uncertainty;
  return p;
}

bool same(double a, double b) {
  return std::fabs(a - b) <= 1e-12 * (1 + std::fabs(b));
}

bool equal(const Result& a, const Result& b) {
  bool ok = same(a.threshold, b.threshold) && same(a.mean_uncertainty, b.mean_uncertainty);
  for (std::size_t i = 0; i < a.gate.size(); ++i) {
    ok = ok && same(a.advantage[i], b.advantage[i]) && a.uncertainty[i] == b.uncertainty[i] &&
         a.gate[i] == b.gate[i];
  }
  return ok;
}

enum class Kernel { kOneLaunch, kSorted };

// Emulation is slow, so all combinations of the options are tried at one size only.
int compare(std::int64_t n, std::int64_t num_aux, std::int64_t groups, Kernel kernel,
            bool all_options = false) {
  const bool sorted = kernel == Kernel::kSorted;
  int failures = 0;
  const Case c = random_case(n, num_aux, groups, static_cast<unsigned>(n + 7 * num_aux));
  for (const auto norm :
       {AdvantageNorm::kNone, AdvantageNorm::kGroupStd, AdvantageNorm::kGlobalStd}) {
    for (const auto mode :
         {GateMode::kPaper, GateMode::kOfficial, GateMode::kAll, GateMode::kOff}) {
      for (const auto scope : {RankScope::kBatch, RankScope::kGroup}) {
        for (const bool with_distance : {false, true}) {
          if (!all_options && (norm != AdvantageNorm::kGroupStd || !with_distance)) continue;
          if (!all_options && (mode == GateMode::kAll || mode == GateMode::kOff)) continue;
          Result want, got;
          gardo::ShapeRewardsParams cpu = bind(c, want);
          gardo::ShapeRewardsCudaParams gpu{};
          gpu.common = bind(c, got);
          const double fraction = 0.3;
          for (gardo::ShapeRewardsParams* p : {&cpu, &gpu.common}) {
            p->advantage_norm = norm;
            p->gate_mode = mode;
            p->scope = scope;
            if (!with_distance) p->distance = nullptr;
          }
          cpu.fraction = fraction;
          gpu.common.fraction = with_distance ? -1.0 : fraction;
          gpu.device_fraction = with_distance ? &fraction : nullptr;
          std::vector<char> workspace(sorted ? gardo::sorted::workspace_bytes(n)
                                             : gardo::shape_rewards_cuda_workspace(n, num_aux),
                                      0x5a);
          gpu.workspace = workspace.data();
          gpu.workspace_size = static_cast<std::int64_t>(workspace.size());
          gardo::shape_rewards_cpu(cpu);
          if (sorted) {
            gardo::sorted::shape(gpu);
          } else {
            gardo::shape_rewards_cuda(gpu);
          }
          if (equal(got, want)) continue;
          ++failures;
          std::fprintf(stderr, "FAILED: n=%lld aux=%lld norm=%d gate=%d scope=%d distance=%d %s\n",
                       static_cast<long long>(n), static_cast<long long>(num_aux),
                       static_cast<int>(norm), static_cast<int>(mode), static_cast<int>(scope),
                       with_distance, sorted ? "sorted" : "one launch");
        }
      }
    }
  }
  return failures;
}

int compare_win_rates(std::int64_t n, std::int64_t num_rewards, Kernel kernel) {
  const Case c = random_case(n, num_rewards, 3, static_cast<unsigned>(n));
  int failures = 0;
  for (const bool grouped : {false, true}) {
    std::vector<double> want(c.aux.size(), -1.0), got(c.aux.size(), -1.0);
    gardo::WinRateParams cpu{};
    cpu.rewards = c.aux.data();
    cpu.groups = grouped ? c.groups.data() : nullptr;
    cpu.num_rewards = num_rewards;
    cpu.num_samples = n;
    cpu.num_threads = 1;
    cpu.rate = want.data();
    gardo::win_rate_cpu(cpu);
    gardo::WinRateCudaParams gpu{};
    gpu.common = cpu;
    gpu.common.rate = got.data();
    if (kernel == Kernel::kOneLaunch) {
      gardo::win_rate_cuda(gpu);
    } else {
      gardo::sorted::Pieces pieces(nullptr);
      gardo::divide(pieces, n);
      std::vector<char> workspace(pieces.used(), 0x5a);
      gpu.workspace = workspace.data();
      gardo::rank_by_sorting(gpu, nullptr);
    }
    for (std::size_t i = 0; i < want.size(); ++i) {
      const bool both_missing = std::isnan(want[i]) && std::isnan(got[i]);
      if (want[i] == got[i] || both_missing) continue;
      ++failures;
      std::fprintf(stderr, "FAILED: win rate %zu of %lld, grouped=%d: %g, expected %g\n", i,
                   static_cast<long long>(n), grouped, got[i], want[i]);
    }
  }
  return failures;
}

}  // namespace

int main() {
  int failures = 0;
  failures += compare(40, 2, 3, Kernel::kOneLaunch, true);
  failures += compare(40, 2, 3, Kernel::kSorted, true);
  for (const std::int64_t n : {0, 1, 130}) failures += compare(n, 3, 4, Kernel::kOneLaunch);
  for (const std::int64_t n : {1, 300}) failures += compare(n, 3, 4, Kernel::kSorted);
  failures += compare(20, 0, 3, Kernel::kOneLaunch);
  failures += compare(20, 0, 3, Kernel::kSorted);
  for (const std::int64_t n : {1, 40, 130}) {
    failures += compare_win_rates(n, 3, Kernel::kOneLaunch);
    failures += compare_win_rates(n, 3, Kernel::kSorted);
  }
  if (failures != 0) return EXIT_FAILURE;
  std::puts("emulated CUDA kernels agree with the CPU kernels");
  return EXIT_SUCCESS;
}
