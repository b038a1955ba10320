// Group advantages of one epoch, with the diversity factor.
#pragma once

#include <cstdint>

#include "launch_limits.h"

namespace gardo {

enum class AdvantageNorm : int { kNone = 0, kGroupStd = 1, kGlobalStd = 2 };
enum class DiversityScale : int { kGroupMean = 0, kRaw = 1 };

// All pointers are contiguous. A sample with a value that is not finite takes no part.
struct GroupAdvantagesParams {
  const double* proxy;         // [N]
  const std::int64_t* groups;  // [N], any values in any order
  const double* distance;      // [N] or null: no diversity factor
  std::int64_t num_samples;    // N
  AdvantageNorm norm;
  DiversityScale diversity_scale;
  int num_threads;

  double* advantage;  // out [N]
};

void group_advantages_cpu(const GroupAdvantagesParams& params);

// On a GPU: all pointers are device memory, work is enqueued on `stream` (a cudaStream_t) of the
// current device, nothing waits for the host, and the calls can be captured in a CUDA graph.
struct GroupAdvantagesCudaParams {
  GroupAdvantagesParams common;
  void* workspace;  // group_advantages_cuda_workspace(N) bytes, 256-byte aligned
  std::int64_t workspace_size;
  void* stream;
};

// 0 where one launch is enough: up to kOneLaunchSamples samples. Above, samples are sorted.
std::int64_t group_advantages_cuda_workspace(std::int64_t num_samples);

// Throws std::runtime_error with CUDA's message when a launch fails, std::invalid_argument for a
// workspace that is too small.
void group_advantages_cuda(const GroupAdvantagesCudaParams& params);

// What the advantage of a sample is, once its group is known.
#ifdef __CUDACC__
__host__ __device__
#endif
    inline double advantage_of(const GroupAdvantagesParams& p, std::int64_t i, double mean,
                               double scale, double mean_distance) {
  const double advantage = (p.proxy[i] - mean) / scale;
  if (p.distance == nullptr || !(advantage >= 0.0)) return advantage;
  if (p.diversity_scale == DiversityScale::kRaw) return advantage * p.distance[i];
  // Identical images (mean distance 0) carry no information about diversity: factor 1.
  return mean_distance > 0.0 ? advantage * (p.distance[i] / mean_distance) : advantage;
}

}  // namespace gardo
