#include "shape_rewards.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "groups.h"
#include "ranking.h"

namespace gardo {
namespace {

using std::int64_t;

// A sample takes part when all its values are finite numbers.
std::vector<std::uint8_t> valid_samples(const ShapeRewardsParams& p) {
  std::vector<std::uint8_t> valid(p.num_samples);
  for (int64_t i = 0; i < p.num_samples; ++i) {
    bool ok = std::isfinite(p.proxy[i]);
    for (int64_t k = 0; k < p.num_aux && ok; ++k) ok = std::isfinite(p.aux[k * p.num_samples + i]);
    ok = ok && (p.distance == nullptr || std::isfinite(p.distance[i]));
    valid[i] = ok;
  }
  return valid;
}

// Mean and population variance of `values` over the valid members of `members`.
struct Moments {
  int64_t count = 0;
  double mean = 0.0;
  double variance = 0.0;
};

Moments moments(const double* values, const int64_t* members, int64_t n,
                const std::vector<std::uint8_t>& valid) {
  Moments m;
  double sum = 0.0;
  for (int64_t j = 0; j < n; ++j) {
    if (!valid[members[j]]) continue;
    sum += values[members[j]];
    ++m.count;
  }
  if (m.count == 0) return m;
  m.mean = sum / static_cast<double>(m.count);
  double squares = 0.0;
  for (int64_t j = 0; j < n; ++j) {
    if (!valid[members[j]]) continue;
    const double centred = values[members[j]] - m.mean;
    squares += centred * centred;
  }
  m.variance = squares / static_cast<double>(m.count);
  return m;
}

constexpr double kStdEps = 1e-4;

void group_advantages(const ShapeRewardsParams& p, const Groups& groups,
                      const std::vector<std::uint8_t>& valid) {
  double global_scale = 1.0;
  if (p.advantage_norm == AdvantageNorm::kGlobalStd) {
    const Groups all = single_group(p.num_samples);
    const Moments m = moments(p.proxy, all.order.data(), p.num_samples, valid);
    global_scale = std::sqrt(m.variance) + kStdEps;
  }
#pragma omp parallel for num_threads(p.num_threads) \
    schedule(static) if (p.num_samples > kParallelSamples)
  for (int64_t g = 0; g < groups.count(); ++g) {
    const int64_t* members = groups.order.data() + groups.start[g];
    const int64_t n = groups.start[g + 1] - groups.start[g];
    const Moments reward = moments(p.proxy, members, n, valid);
    const double scale = p.advantage_norm == AdvantageNorm::kGroupStd
                             ? std::sqrt(reward.variance) + kStdEps
                             : global_scale;
    double mean_distance = 0.0;
    if (p.distance != nullptr) mean_distance = moments(p.distance, members, n, valid).mean;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t i = members[j];
      if (!valid[i]) {
        p.advantage[i] = 0.0;
        continue;
      }
      double advantage = (p.proxy[i] - reward.mean) / scale;
      // Identical images (mean distance 0) carry no information about diversity: factor 1.
      if (mean_distance > 0.0 && advantage >= 0.0) advantage *= p.distance[i] / mean_distance;
      p.advantage[i] = advantage;
    }
  }
}

void uncertainties(const ShapeRewardsParams& p, const Groups& scopes,
                   const std::vector<std::uint8_t>& valid) {
  const bool official = p.gate_mode == GateMode::kOfficial;
  const int64_t n = p.num_samples;
  const int64_t rewards = p.num_aux + 1;
  std::vector<int64_t> score(rewards * n);
  std::vector<Keyed> ranked(rewards * n), scratch(rewards * n);
  const int64_t jobs = scopes.count() * rewards;
#pragma omp parallel for num_threads(p.num_threads) schedule(dynamic) if (n > kParallelSamples)
  for (int64_t job = 0; job < jobs; ++job) {
    const int64_t k = job / scopes.count();
    const int64_t s = job % scopes.count();
    const int64_t begin = scopes.start[s];
    const int64_t size = scopes.start[s + 1] - begin;
    const double* reward = k == 0 ? p.proxy : p.aux + (k - 1) * n;
    Keyed* own = ranked.data() + k * n + begin;
    const int64_t count = rank_members(reward, scopes.order.data() + begin, size, valid.data(),
                                       official, own, scratch.data() + k * n + begin);
    int64_t* scores = score.data() + k * n;
    if (official) {
      for (int64_t j = 0; j < count; ++j) scores[own[j].index] = j + 1;
    } else {
      doubled_wins(own, count, scores);
    }
  }
#pragma omp parallel for num_threads(p.num_threads) schedule(static) if (n > kParallelSamples)
  for (int64_t s = 0; s < scopes.count(); ++s) {
    int64_t count = 0;
    for (int64_t j = scopes.start[s]; j < scopes.start[s + 1]; ++j) count += valid[scopes.order[j]];
    for (int64_t j = scopes.start[s]; j < scopes.start[s + 1]; ++j) {
      const int64_t i = scopes.order[j];
      if (!valid[i] || p.num_aux == 0 || (count < 2 && !official)) {
        p.uncertainty[i] = 0.0;
        continue;
      }
      int64_t sum_aux = 0;
      for (int64_t k = 1; k < rewards; ++k) sum_aux += score[k * n + i];
      // In integers up to here, so that agreement is exactly 0 and ties compare equal.
      const int64_t gap = p.num_aux * score[i] - sum_aux;
      const int64_t unit = official ? p.num_aux : 2 * (count - 1) * p.num_aux;
      p.uncertainty[i] = static_cast<double>(gap) / static_cast<double>(unit);
    }
  }
}

// The q-quantile of `values` by linear interpolation; reorders them.
double quantile(std::vector<double>& values, double q) {
  const double position = q * static_cast<double>(values.size() - 1);
  const auto lower = static_cast<std::size_t>(position);
  const double weight = position - static_cast<double>(lower);
  std::nth_element(values.begin(), values.begin() + lower, values.end());
  const double low = values[lower];
  if (lower + 1 == values.size()) return low;
  const double high = *std::min_element(values.begin() + lower + 1, values.end());
  return weight < 0.5 ? low + (high - low) * weight : high - (high - low) * (1.0 - weight);
}

void gate_samples(const ShapeRewardsParams& p, const std::vector<std::uint8_t>& valid) {
  std::vector<double> positive;
  double sum = 0.0;
  for (int64_t i = 0; i < p.num_samples; ++i) {
    if (!valid[i] || !(p.uncertainty[i] >= 0.0)) continue;
    positive.push_back(p.uncertainty[i]);
    sum += p.uncertainty[i];
  }
  *p.mean_uncertainty = positive.empty() ? 0.0 : sum / static_cast<double>(positive.size());
  *p.threshold = positive.empty() ? 0.0 : quantile(positive, 1.0 - p.fraction);
  for (int64_t i = 0; i < p.num_samples; ++i) {
    switch (p.gate_mode) {
      case GateMode::kPaper:
      case GateMode::kOfficial:
        p.gate[i] = valid[i] && p.uncertainty[i] > *p.threshold;
        break;
      case GateMode::kAll:
        p.gate[i] = valid[i];
        break;
      case GateMode::kOff:
        p.gate[i] = 0;
        break;
    }
  }
}

}  // namespace

void shape_rewards_cpu(const ShapeRewardsParams& p) {
  const std::vector<std::uint8_t> valid = valid_samples(p);
  const Groups groups = sort_groups(p.groups, p.num_samples);
  group_advantages(p, groups, valid);
  uncertainties(p, p.scope == RankScope::kBatch ? single_group(p.num_samples) : groups, valid);
  gate_samples(p, valid);
}

}  // namespace gardo
