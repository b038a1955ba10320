#include "win_rate.h"

#include <cmath>
#include <vector>

#include "groups.h"
#include "ranking.h"

namespace gardo {

using std::int64_t;

void win_rate_cpu(const WinRateParams& p) {
  const int64_t n = p.num_samples;
  const Groups groups = p.groups == nullptr ? single_group(n) : sort_groups(p.groups, n);
  const auto total = static_cast<std::size_t>(p.num_rewards * n);
  std::vector<std::uint8_t> valid(total);
  std::vector<int64_t> wins(total);
  std::vector<Keyed> ranked(total), scratch(total);
  for (std::size_t i = 0; i < total; ++i) valid[i] = !std::isnan(p.rewards[i]);
  const int64_t jobs = groups.count() * p.num_rewards;
#pragma omp parallel for num_threads(p.num_threads) schedule(dynamic) if (n > kParallelSamples)
  for (int64_t job = 0; job < jobs; ++job) {
    const int64_t row = job / groups.count() * n;
    const int64_t begin = groups.start[job % groups.count()];
    const int64_t size = groups.start[job % groups.count() + 1] - begin;
    const int64_t* members = groups.order.data() + begin;
    Keyed* own = ranked.data() + row + begin;
    const int64_t count = rank_members(p.rewards + row, members, size, valid.data() + row, false,
                                       own, scratch.data() + row + begin);
    doubled_wins(own, count, 1, wins.data() + row);
    for (int64_t j = 0; j < size; ++j) {
      const int64_t i = row + members[j];
      if (!valid[i]) {
        p.rate[i] = p.rewards[i];
      } else if (count < 2) {
        p.rate[i] = 0.5;
      } else {
        p.rate[i] = static_cast<double>(wins[i]) / static_cast<double>(2 * (count - 1));
      }
    }
  }
}

}  // namespace gardo
