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

// What is set up before the parallel part of the work.
struct Plan {
  const ShapeRewardsParams& p;
  const Groups groups;
  const Groups scopes;  // the samples that are ranked together
  const std::vector<std::uint8_t> valid;
  double global_scale = 1.0;
  std::vector<int64_t> score;  // [K + 1, N]: doubled wins, or the ordinal rank (official)

  explicit Plan(const ShapeRewardsParams& params)
      : p(params),
        groups(sort_groups(p.groups, p.num_samples)),
        scopes(p.scope == RankScope::kBatch ? single_group(p.num_samples) : groups),
        valid(valid_samples(p)),
        score((p.num_aux + 1) * p.num_samples) {
    if (p.advantage_norm != AdvantageNorm::kGlobalStd) return;
    const Groups all = single_group(p.num_samples);
    global_scale = scale_of(moments(p.proxy, all.order.data(), p.num_samples, valid));
  }

  static double scale_of(const Moments& m) { return std::sqrt(m.variance) + kStdEps; }
};

void group_advantages(const Plan& plan, int64_t g) {
  const ShapeRewardsParams& p = plan.p;
  const int64_t* members = plan.groups.order.data() + plan.groups.start[g];
  const int64_t n = plan.groups.start[g + 1] - plan.groups.start[g];
  const Moments reward = moments(p.proxy, members, n, plan.valid);
  const double scale =
      p.advantage_norm == AdvantageNorm::kGroupStd ? Plan::scale_of(reward) : plan.global_scale;
  double mean_distance = 0.0;
  if (p.distance != nullptr) mean_distance = moments(p.distance, members, n, plan.valid).mean;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t i = members[j];
    if (!plan.valid[i]) {
      p.advantage[i] = 0.0;
      continue;
    }
    double advantage = (p.proxy[i] - reward.mean) / scale;
    // Identical images (mean distance 0) carry no information about diversity: factor 1.
    if (mean_distance > 0.0 && advantage >= 0.0) advantage *= p.distance[i] / mean_distance;
    p.advantage[i] = advantage;
  }
}

// Scores of the samples of scope `s` by reward `k`: 0 is the proxy, then the auxiliaries.
void rank_scope(Plan& plan, int64_t k, int64_t s, Keyed* ranked, Keyed* scratch) {
  const ShapeRewardsParams& p = plan.p;
  const bool official = p.gate_mode == GateMode::kOfficial;
  const int64_t begin = plan.scopes.start[s];
  const int64_t size = plan.scopes.start[s + 1] - begin;
  const double* reward = k == 0 ? p.proxy : p.aux + (k - 1) * p.num_samples;
  const int64_t count = rank_members(reward, plan.scopes.order.data() + begin, size,
                                     plan.valid.data(), official, ranked + begin, scratch + begin);
  int64_t* score = plan.score.data() + k * p.num_samples;
  if (!official) return doubled_wins(ranked + begin, count, score);
  for (int64_t j = 0; j < count; ++j) score[ranked[begin + j].index] = j + 1;
}

void scope_uncertainties(const Plan& plan, int64_t s) {
  const ShapeRewardsParams& p = plan.p;
  const bool official = p.gate_mode == GateMode::kOfficial;
  const int64_t* members = plan.scopes.order.data() + plan.scopes.start[s];
  const int64_t n = plan.scopes.start[s + 1] - plan.scopes.start[s];
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += plan.valid[members[j]];
  const bool ranked = p.num_aux > 0 && (count > 1 || official);
  const int64_t unit = official ? p.num_aux : 2 * (count - 1) * p.num_aux;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t i = members[j];
    p.uncertainty[i] = 0.0;
    if (!ranked || !plan.valid[i]) continue;
    int64_t sum_aux = 0;
    for (int64_t k = 1; k <= p.num_aux; ++k) sum_aux += plan.score[k * p.num_samples + i];
    // In integers up to here, so that agreement is exactly 0 and ties compare equal.
    const int64_t gap = p.num_aux * plan.score[i] - sum_aux;
    p.uncertainty[i] = static_cast<double>(gap) / static_cast<double>(unit);
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
  Plan plan(p);
  const int64_t n = p.num_samples;
  const int64_t scopes = plan.scopes.count();
  const int64_t rankings = (p.num_aux + 1) * scopes;
  std::vector<Keyed> ranked((p.num_aux + 1) * n), scratch((p.num_aux + 1) * n);
#pragma omp parallel num_threads(p.num_threads) if (n > kParallelSamples)
  {
#pragma omp for schedule(dynamic) nowait
    for (int64_t job = 0; job < rankings; ++job) {
      const int64_t k = job / scopes;
      rank_scope(plan, k, job % scopes, ranked.data() + k * n, scratch.data() + k * n);
    }
    // By whoever has no ranking left, and then, after the last ranking, all.
#pragma omp for schedule(dynamic)
    for (int64_t g = 0; g < plan.groups.count(); ++g) group_advantages(plan, g);
#pragma omp for schedule(static)
    for (int64_t s = 0; s < scopes; ++s) scope_uncertainties(plan, s);
  }
  gate_samples(p, plan.valid);
}

void shape_rewards_cpu(const BasicShapeRewardsParams<float>& p) {
  const int64_t n = p.num_samples;
  const std::vector<double> proxy(p.proxy, p.proxy + n), aux(p.aux, p.aux + p.num_aux * n);
  std::vector<double> distance, advantage(n), uncertainty(n);
  if (p.distance != nullptr) distance.assign(p.distance, p.distance + n);
  double threshold, mean_uncertainty;
  shape_rewards_cpu(ShapeRewardsParams{
      proxy.data(), aux.data(), p.groups, p.distance == nullptr ? nullptr : distance.data(), n,
      p.num_aux, p.fraction, p.advantage_norm, p.gate_mode, p.scope, p.num_threads,
      advantage.data(), uncertainty.data(), p.gate, &threshold, &mean_uncertainty});
  const auto round = [](double value) { return static_cast<float>(value); };
  std::transform(advantage.begin(), advantage.end(), p.advantage, round);
  std::transform(uncertainty.begin(), uncertainty.end(), p.uncertainty, round);
  *p.threshold = round(threshold);
  *p.mean_uncertainty = round(mean_uncertainty);
}

}  // namespace gardo
