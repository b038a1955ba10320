#include "group_advantages.h"

#include <cmath>
#include <vector>

#include "groups.h"
#include "ranking.h"

namespace gardo {
namespace {

using std::int64_t;

constexpr double kStdEps = 1e-4;

// Mean and population variance of `values` over the valid members of `members`.
struct Moments {
  int64_t count = 0;
  double mean = 0.0;
  double variance = 0.0;

  double scale() const { return std::sqrt(variance) + kStdEps; }
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

void group_advantages(const GroupAdvantagesParams& p, const int64_t* members, int64_t n,
                      const std::vector<std::uint8_t>& valid, double global_scale) {
  const Moments reward = moments(p.proxy, members, n, valid);
  const double scale = p.norm == AdvantageNorm::kGroupStd ? reward.scale() : global_scale;
  double mean_distance = 0.0;
  if (p.distance != nullptr) mean_distance = moments(p.distance, members, n, valid).mean;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t i = members[j];
    p.advantage[i] = valid[i] ? advantage_of(p, i, reward.mean, scale, mean_distance) : 0.0;
  }
}

}  // namespace

void group_advantages_cpu(const GroupAdvantagesParams& p) {
  const int64_t n = p.num_samples;
  std::vector<std::uint8_t> valid(n);
  for (int64_t i = 0; i < n; ++i) {
    valid[i] = std::isfinite(p.proxy[i]) && (p.distance == nullptr || std::isfinite(p.distance[i]));
  }
  double global_scale = 1.0;
  if (p.norm == AdvantageNorm::kGlobalStd) {
    global_scale = moments(p.proxy, single_group(n).order.data(), n, valid).scale();
  }
  const Groups groups = sort_groups(p.groups, n);
#pragma omp parallel for num_threads(p.num_threads) schedule(dynamic) if (n > kParallelSamples)
  for (int64_t g = 0; g < groups.count(); ++g) {
    const int64_t begin = groups.start[g];
    group_advantages(p, groups.order.data() + begin, groups.start[g + 1] - begin, valid,
                     global_scale);
  }
}

}  // namespace gardo
