#include "gate_samples.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "groups.h"
#include "ranking.h"

namespace gardo {
namespace {

using std::int64_t;

// What is set up before the parallel part of the work.
struct Plan {
  const GateSamplesParams& p;
  const Groups scopes;  // the samples that are ranked together
  std::vector<std::uint8_t> valid;
  std::vector<int64_t> score;  // [K + 1, N]: doubled wins, or the ordinal rank
  std::vector<double> sum;     // of the U of each scope

  explicit Plan(const GateSamplesParams& params)
      : p(params),
        scopes(p.scope == RankScope::kBatch ? single_group(p.num_samples)
                                            : sort_groups(p.groups, p.num_samples)),
        valid(p.num_samples),
        score((p.num_aux + 1) * p.num_samples),
        sum(scopes.count()) {
    for (int64_t i = 0; i < p.num_samples; ++i) {
      bool ok = std::isfinite(p.proxy[i]);
      for (int64_t k = 0; k < p.num_aux && ok; ++k) {
        ok = std::isfinite(p.aux[k * p.num_samples + i]);
      }
      valid[i] = ok;
    }
  }

  const int64_t* members(int64_t s) const { return scopes.order.data() + scopes.start[s]; }
  int64_t size(int64_t s) const { return scopes.start[s + 1] - scopes.start[s]; }
};

// Scores of the samples of scope `s` by reward `k`: 0 is the proxy, then the auxiliaries.
void rank_scope(Plan& plan, int64_t k, int64_t s, Keyed* ranked, Keyed* scratch) {
  const GateSamplesParams& p = plan.p;
  const int64_t begin = plan.scopes.start[s];
  const double* reward = k == 0 ? p.proxy : p.aux + (k - 1) * p.num_samples;
  const int64_t count = rank_members(reward, plan.members(s), plan.size(s), plan.valid.data(),
                                     p.side == Side::kUnder, ranked + begin, scratch + begin);
  int64_t* score = plan.score.data() + k * p.num_samples;
  if (p.ties != Ties::kOrdinal) {
    return doubled_wins(ranked + begin, count, p.ties == Ties::kHalf ? 1 : 0, score);
  }
  for (int64_t j = 0; j < count; ++j) score[ranked[begin + j].index] = j + 1;
}

void scope_uncertainties(Plan& plan, int64_t s) {
  const GateSamplesParams& p = plan.p;
  const int64_t* members = plan.members(s);
  const int64_t n = plan.size(s);
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += plan.valid[members[j]];
  const int64_t against = p.ties == Ties::kHalf ? count - 1 : count;
  const bool ranked = p.num_aux > 0 && against > 0;
  const int64_t unit = (p.ties == Ties::kOrdinal ? 1 : 2 * against) * p.num_aux;
  int64_t sum = 0;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t i = members[j];
    p.uncertainty[i] = 0.0;
    if (!ranked || !plan.valid[i]) continue;
    int64_t sum_aux = 0;
    for (int64_t k = 1; k <= p.num_aux; ++k) sum_aux += plan.score[k * p.num_samples + i];
    // In integers up to here, so that agreement is exactly 0 and ties compare equal.
    const int64_t gap = p.num_aux * plan.score[i] - sum_aux;
    p.uncertainty[i] = static_cast<double>(gap) / static_cast<double>(unit);
    sum += gap;
  }
  plan.sum[s] = ranked ? static_cast<double>(sum) / static_cast<double>(unit) : 0.0;
}

// The q-quantile of `values` by linear interpolation, 0 of nothing; reorders them.
double quantile(std::vector<double>& values, double q) {
  if (values.empty()) return 0.0;
  const double position = q * static_cast<double>(values.size() - 1);
  const auto lower = static_cast<std::size_t>(position);
  const double weight = position - static_cast<double>(lower);
  std::nth_element(values.begin(), values.begin() + lower, values.end());
  const double low = values[lower];
  if (lower + 1 == values.size()) return low;
  const double high = *std::min_element(values.begin() + lower + 1, values.end());
  return weight < 0.5 ? low + (high - low) * weight : high - (high - low) * (1.0 - weight);
}

// Gate of the n samples members[0, n), or 0, 1, ... where it is null; returns the threshold.
double gate_members(const Plan& plan, const int64_t* members, int64_t n,
                    std::vector<double>& eligible) {
  const GateSamplesParams& p = plan.p;
  eligible.clear();
  const auto at = [&](int64_t j) { return members == nullptr ? j : members[j]; };
  for (int64_t j = 0; j < n; ++j) {
    const double u = p.uncertainty[at(j)];
    if (plan.valid[at(j)] && (p.share_of == ShareOf::kAll || u >= 0.0)) eligible.push_back(u);
  }
  const double threshold = quantile(eligible, 1.0 - p.fraction);
  for (int64_t j = 0; j < n; ++j) {
    p.gate[at(j)] = plan.valid[at(j)] && p.uncertainty[at(j)] > threshold;
  }
  return threshold;
}

// Of the samples that the fraction is a share of.
double mean_uncertainty(const Plan& plan) {
  const GateSamplesParams& p = plan.p;
  if (has_zero_mean(p)) return 0.0;
  const bool all = p.share_of == ShareOf::kAll;
  double sum = 0.0;
  int64_t count = 0;
  for (int64_t i = 0; i < p.num_samples; ++i) {
    if (!plan.valid[i] || !(all || p.uncertainty[i] >= 0.0)) continue;
    sum += p.uncertainty[i];
    ++count;
  }
  if (all) sum = std::accumulate(plan.sum.begin(), plan.sum.end(), 0.0);
  return count == 0 ? 0.0 : sum / static_cast<double>(count);
}

}  // namespace

void gate_samples_cpu(const GateSamplesParams& p) {
  Plan plan(p);
  const int64_t n = p.num_samples;
  const int64_t scopes = plan.scopes.count();
  const int64_t rankings = (p.num_aux + 1) * scopes;
  std::vector<Keyed> ranked((p.num_aux + 1) * n), scratch((p.num_aux + 1) * n);
#pragma omp parallel num_threads(p.num_threads) if (n > kParallelSamples)
  {
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < rankings; ++job) {
      const int64_t k = job / scopes;
      rank_scope(plan, k, job % scopes, ranked.data() + k * n, scratch.data() + k * n);
    }
#pragma omp for schedule(static)
    for (int64_t s = 0; s < scopes; ++s) scope_uncertainties(plan, s);
  }
  *p.mean_uncertainty = mean_uncertainty(plan);
  std::vector<double> eligible;
  if (!has_group_thresholds(p)) {
    *p.threshold = gate_members(plan, nullptr, n, eligible);
    return;
  }
  for (int64_t s = 0; s < scopes; ++s) {
    const double threshold = gate_members(plan, plan.members(s), plan.size(s), eligible);
    for (int64_t j = 0; j < plan.size(s); ++j) {
      const int64_t i = plan.members(s)[j];
      p.threshold[i] = plan.valid[i] ? threshold : 0.0;
    }
  }
}

}  // namespace gardo
