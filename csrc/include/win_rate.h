// Share of the other samples that each sample beats, a tie counting one half.
#pragma once

#include <cstdint>

namespace gardo {

struct WinRateParams {
  const double* rewards;       // [K, N]; NaN: missing, and no one's rival
  const std::int64_t* groups;  // [N], any values in any order, or null: one group
  std::int64_t num_rewards;    // K
  std::int64_t num_samples;    // N
  int num_threads;

  double* rate;  // out [K, N]: 0.5 without others, NaN where the reward is
};

void win_rate_cpu(const WinRateParams& params);

}  // namespace gardo
