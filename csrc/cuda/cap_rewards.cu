#include "cap_rewards.h"

#include <cuda_runtime.h>

#include "launch.cuh"

namespace gardo {
namespace capping {

constexpr int kThreads = 128;

// One thread per sample: its searches take a few dozen reads of a pool that stays in the cache.
__global__ void __launch_bounds__(kThreads)
    cap(const CapRewardsParams p, const double* device_tau) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.num_samples) return;
  p.capped[i] = capped(p, valid_size(p), device_tau == nullptr ? p.tau : *device_tau, i);
}

}  // namespace capping

void cap_rewards_cuda(const CapRewardsCudaParams& params) {
  const CapRewardsParams& p = params.common;
  if (p.num_samples == 0) return;
  const auto blocks =
      static_cast<unsigned int>((p.num_samples + capping::kThreads - 1) / capping::kThreads);
  launch(capping::cap, blocks, capping::kThreads, 0, static_cast<cudaStream_t>(params.stream), p,
         params.device_tau);
}

}  // namespace gardo
