#include "shape_rewards.h"

#include <cuda_runtime.h>

#include <cmath>
#include <stdexcept>

#include "launch.cuh"
#include "shape_rewards_kernel.cuh"
#include "shape_rewards_sorted.cuh"

namespace gardo {
namespace {

__global__ void __launch_bounds__(one_launch::kThreads)
    shape_rewards_kernel(const ShapeRewardsParams p, const double* device_fraction, int padded,
                         unsigned int* finished) {
  GARDO_DYNAMIC_SHARED(double, shared);
  __shared__ bool last;
  one_launch::shape_block(p, shared);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(finished, 1u) + 1 == gridDim.x;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const double fraction = device_fraction == nullptr ? p.fraction : *device_fraction;
  one_launch::gate_block(p, fraction, shared, padded);
}

bool fits_one_launch(std::int64_t num_samples, std::int64_t num_aux) {
  return num_samples <= kOneLaunchSamples && num_aux <= kOneLaunchAux;
}

void shape_in_one_launch(const ShapeRewardsCudaParams& params) {
  const ShapeRewardsParams& p = params.common;
  const auto stream = static_cast<cudaStream_t>(params.stream);
  auto* finished = static_cast<unsigned int*>(params.workspace);
  int padded = 1;
  while (padded < p.num_samples) padded *= 2;
  const auto blocks = static_cast<unsigned int>((p.num_samples + one_launch::kPerBlock - 1) /
                                                one_launch::kPerBlock);
  check(cudaMemsetAsync(finished, 0, sizeof(*finished), stream));
  // One block also runs without samples, for the threshold and the mean.
  launch(shape_rewards_kernel, blocks == 0 ? 1 : blocks, one_launch::kThreads,
         one_launch::shared_bytes(p.num_aux, padded), stream, p, params.device_fraction, padded,
         finished);
}

}  // namespace

std::int64_t shape_rewards_cuda_workspace(std::int64_t num_samples, std::int64_t num_aux) {
  if (fits_one_launch(num_samples, num_aux)) return 256;
  return sorted::workspace_bytes(num_samples);
}

void shape_rewards_cuda(const ShapeRewardsCudaParams& params) {
  const ShapeRewardsParams& p = params.common;
  if (params.workspace_size < shape_rewards_cuda_workspace(p.num_samples, p.num_aux)) {
    throw std::invalid_argument("workspace: too small");
  }
  if (fits_one_launch(p.num_samples, p.num_aux)) {
    shape_in_one_launch(params);
  } else {
    sorted::shape(params);
  }
}

}  // namespace gardo
