// Runs the CUDA kernels on the CPU (see cuda_shim/) and compares them with the CPU kernels, which
// the Python tests compare with the float64 reference.
#include "../cuda/cap_rewards.cu"
#include "../cuda/gate_samples.cu"
#include "../cuda/group_advantages.cu"
#include "../cuda/win_rate.cu"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

namespace {

using gardo::AdvantageNorm;
using gardo::DiversityScale;
using gardo::RankScope;
using gardo::ShareOf;
using gardo::Side;
using gardo::Ties;

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

bool same(double a, double b) {
  return std::fabs(a - b) <= 1e-12 * (1 + std::fabs(b));
}

bool same(const std::vector<double>& a, const std::vector<double>& b) {
  bool ok = a.size() == b.size();
  for (std::size_t i = 0; ok && i < a.size(); ++i) ok = same(a[i], b[i]);
  return ok;
}

enum class Kernel { kOneLaunch, kSorted };

int compare_advantages(std::int64_t n, std::int64_t groups, Kernel kernel) {
  const Case c = random_case(n, 0, groups, static_cast<unsigned>(n));
  int failures = 0;
  for (const auto norm :
       {AdvantageNorm::kNone, AdvantageNorm::kGroupStd, AdvantageNorm::kGlobalStd}) {
    for (const auto scale : {DiversityScale::kGroupMean, DiversityScale::kRaw}) {
      for (const bool with_distance : {false, true}) {
        std::vector<double> want(n, std::nan("")), got(n, std::nan(""));
        gardo::GroupAdvantagesParams cpu{};
        cpu.proxy = c.proxy.data();
        cpu.groups = c.groups.data();
        cpu.distance = with_distance ? c.distance.data() : nullptr;
        cpu.num_samples = n;
        cpu.norm = norm;
        cpu.diversity_scale = scale;
        cpu.num_threads = 1;
        cpu.advantage = want.data();
        gardo::group_advantages_cpu(cpu);
        gardo::GroupAdvantagesCudaParams gpu{};
        gpu.common = cpu;
        gpu.common.advantage = got.data();
        gardo::sorted::Pieces pieces(nullptr);
        gardo::advantages::divide(pieces, n);
        std::vector<char> workspace(pieces.used(), 0x5a);
        gpu.workspace = workspace.data();
        gpu.workspace_size = static_cast<std::int64_t>(workspace.size());
        if (kernel == Kernel::kSorted) {
          gardo::advantages::by_sorting(gpu);
        } else {
          gardo::group_advantages_cuda(gpu);
        }
        if (same(got, want)) continue;
        ++failures;
        std::fprintf(stderr, "FAILED: advantages n=%lld norm=%d scale=%d distance=%d %s\n",
                     static_cast<long long>(n), static_cast<int>(norm), static_cast<int>(scale),
                     with_distance, kernel == Kernel::kSorted ? "sorted" : "one launch");
      }
    }
  }
  return failures;
}

struct Gated {
  std::vector<double> uncertainty, threshold;
  std::vector<std::uint8_t> gate;
  double mean = std::nan("");
};

void bind(const Case& c, gardo::GateSamplesParams& p, Gated& r) {
  const std::size_t n = c.proxy.size();
  r.uncertainty.assign(n, std::nan(""));
  r.threshold.assign(gardo::has_group_thresholds(p) ? n : 1, std::nan(""));
  r.gate.assign(n, 77);
  p.proxy = c.proxy.data();
  p.aux = c.aux.data();
  p.groups = c.groups.data();
  p.num_samples = static_cast<std::int64_t>(n);
  p.num_aux = n == 0 ? 0 : static_cast<std::int64_t>(c.aux.size() / n);
  p.num_threads = 1;
  p.uncertainty = r.uncertainty.data();
  p.gate = r.gate.data();
  p.threshold = r.threshold.data();
  p.mean_uncertainty = &r.mean;
}

// Emulation is slow, so all combinations of the options are tried at one size only.
int compare_gates(std::int64_t n, std::int64_t num_aux, std::int64_t groups, Kernel kernel,
                  bool all_options = false) {
  const Case c = random_case(n, num_aux, groups, static_cast<unsigned>(n + 7 * num_aux));
  const double fraction = 0.3;
  int failures = 0;
  for (int options = 0; options < 24; ++options) {
    gardo::GateSamplesParams cpu{};
    cpu.side = static_cast<Side>(options & 1);
    cpu.share_of = static_cast<ShareOf>(options >> 1 & 1);
    cpu.scope = static_cast<RankScope>(options >> 2 & 1);
    cpu.ties = static_cast<Ties>(options / 8);
    cpu.fraction = fraction;
    if (!all_options && cpu.side != Side::kOver && cpu.ties != Ties::kOrdinal) continue;
    Gated want, got;
    bind(c, cpu, want);
    gardo::gate_samples_cpu(cpu);
    gardo::GateSamplesCudaParams gpu{};
    gpu.common = cpu;
    bind(c, gpu.common, got);
    const bool on_device = options % 3 == 0;
    gpu.common.fraction = on_device ? -1.0 : fraction;
    gpu.device_fraction = on_device ? &fraction : nullptr;
    const bool sorted = kernel == Kernel::kSorted;
    std::vector<char> workspace(
        sorted ? gardo::gating::workspace_bytes(n) : gardo::gate_samples_cuda_workspace(n, num_aux),
        0x5a);
    gpu.workspace = workspace.data();
    gpu.workspace_size = static_cast<std::int64_t>(workspace.size());
    if (sorted) {
      gardo::gating::by_sorting(gpu);
    } else {
      gardo::gate_samples_cuda(gpu);
    }
    if (got.uncertainty == want.uncertainty && got.gate == want.gate &&
        same(got.threshold, want.threshold) && same(got.mean, want.mean)) {
      continue;
    }
    ++failures;
    std::fprintf(stderr, "FAILED: gate n=%lld aux=%lld options=%d %s\n", static_cast<long long>(n),
                 static_cast<long long>(num_aux), options, sorted ? "sorted" : "one launch");
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

int compare_caps(std::int64_t n, std::int64_t num_aux, std::int64_t pool_size) {
  const Case c = random_case(n, num_aux, 1, static_cast<unsigned>(n));
  const Case drawn = random_case(pool_size, num_aux, 1, 5);
  std::vector<double> pool(drawn.proxy);
  pool.insert(pool.end(), drawn.aux.begin(), drawn.aux.end());
  for (std::int64_t k = 0; k <= num_aux; ++k) {
    double* const row = pool.data() + k * pool_size;
    std::replace_if(row, row + pool_size, [](double x) { return std::isnan(x); }, 0.0);
    std::sort(row, row + pool_size);
    // the last two are left out, of the smallest pool all
    for (std::int64_t j = pool_size > 2 ? pool_size - 2 : 0; j < pool_size; ++j) row[j] = HUGE_VAL;
  }
  int failures = 0;
  for (const double tau : {-0.4, 0.0, 0.2, 1.0, std::nan("")}) {
    std::vector<double> want(n, -7.0), got(n, -7.0);
    gardo::CapRewardsParams cpu{c.proxy.data(), c.aux.data(), pool.data(), n,          num_aux,
                                pool_size,      tau,          1,           want.data()};
    gardo::cap_rewards_cpu(cpu);
    gardo::CapRewardsCudaParams gpu{cpu, nullptr, nullptr};
    gpu.common.capped = got.data();
    if (tau < 0.1) {
      gpu.common.tau = 9.0;
      gpu.device_tau = &tau;
    }
    gardo::cap_rewards_cuda(gpu);
    for (std::int64_t i = 0; i < n; ++i) {
      if (got[i] == want[i] || (std::isnan(got[i]) && std::isnan(want[i]))) continue;
      ++failures;
      std::fprintf(stderr, "FAILED: cap %lld of %lld, pool of %lld, tau=%g: %g, expected %g\n",
                   static_cast<long long>(i), static_cast<long long>(n),
                   static_cast<long long>(pool_size), tau, got[i], want[i]);
    }
  }
  return failures;
}

}  // namespace

int main() {
  int failures = 0;
  for (const Kernel kernel : {Kernel::kOneLaunch, Kernel::kSorted}) {
    failures += compare_gates(40, 2, 3, kernel, true);
    failures += compare_gates(20, 0, 3, kernel);
    for (const std::int64_t n : {1, 130, 300}) {
      failures += compare_gates(n, 3, 4, kernel);
      failures += compare_advantages(n, 4, kernel);
    }
    failures += compare_advantages(40, 3, kernel);
  }
  failures += compare_gates(0, 3, 1, Kernel::kOneLaunch);
  failures += compare_advantages(0, 1, Kernel::kOneLaunch);
  for (const std::int64_t n : {1, 40, 130}) {
    failures += compare_win_rates(n, 3, Kernel::kOneLaunch);
    failures += compare_win_rates(n, 3, Kernel::kSorted);
  }
  for (const std::int64_t n : {0, 1, 300}) {
    for (const std::int64_t size : {1, 3, 90}) failures += compare_caps(n, 3, size);
  }
  if (failures != 0) return EXIT_FAILURE;
  std::puts("emulated CUDA kernels agree with the CPU kernels");
  return EXIT_SUCCESS;
}
