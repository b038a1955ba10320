// Share of the other samples that each sample beats, a tie counting one half.
#pragma once

#include <cstdint>

#include "launch_limits.h"

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

// As GroupAdvantagesCudaParams: device memory, enqueued on `stream`, capturable.
struct WinRateCudaParams {
  WinRateParams common;
  void* workspace;  // win_rate_cuda_workspace(N) bytes, 256-byte aligned
  std::int64_t workspace_size;
  void* stream;
};

// 0 where one launch is enough: up to kOneLaunchSamples samples (launch_limits.h).
std::int64_t win_rate_cuda_workspace(std::int64_t num_samples);
void win_rate_cuda(const WinRateCudaParams& params);

}  // namespace gardo
