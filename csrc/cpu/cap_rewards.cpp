#include "cap_rewards.h"

#include "ranking.h"

namespace gardo {

void cap_rewards_cpu(const CapRewardsParams& p) {
  const std::int64_t size = capping::valid_size(p);
#pragma omp parallel for num_threads(p.num_threads) if (p.num_samples > kParallelSamples)
  for (std::int64_t i = 0; i < p.num_samples; ++i) {
    p.capped[i] = capping::capped(p, size, p.tau, i);
  }
}

}  // namespace gardo
