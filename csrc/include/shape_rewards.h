// Group advantages, tie-aware win rates, uncertainty and gate of one epoch, in one call.
#pragma once

#include <cstdint>

#include "launch_limits.h"

namespace gardo {

enum class AdvantageNorm : int { kNone = 0, kGroupStd = 1, kGlobalStd = 2 };
enum class GateMode : int { kPaper = 0, kOfficial = 1, kAll = 2, kOff = 3 };
enum class RankScope : int { kBatch = 0, kGroup = 1 };

// All pointers are contiguous. N samples, K auxiliary rewards; T is double or float.
template <typename T>
struct BasicShapeRewardsParams {
  const T* proxy;              // [N]; a sample with a non-finite value anywhere takes no part
  const T* aux;                // [K, N]
  const std::int64_t* groups;  // [N], any values in any order
  const T* distance;           // [N] or null: no diversity factor
  std::int64_t num_samples;    // N
  std::int64_t num_aux;        // K
  double fraction;             // share of the non-negative uncertainties to gate, in [0, 1]
  AdvantageNorm advantage_norm;
  GateMode gate_mode;
  RankScope scope;
  int num_threads;

  T* advantage;         // out [N]
  T* uncertainty;       // out [N]
  std::uint8_t* gate;   // out [N]: 0 or 1
  T* threshold;         // out [1]
  T* mean_uncertainty;  // out [1]: mean of the non-negative uncertainties
};
using ShapeRewardsParams = BasicShapeRewardsParams<double>;

// Throws std::bad_alloc when there is no memory for its O(N * (K + 4)) of workspace.
void shape_rewards_cpu(const ShapeRewardsParams& params);
// The same, computed in double and rounded.
void shape_rewards_cpu(const BasicShapeRewardsParams<float>& params);

// On a GPU: all pointers are device memory, work is enqueued on `stream` (a cudaStream_t) of the
// current device, nothing waits for the host, and the calls can be captured in a CUDA graph.
struct ShapeRewardsCudaParams {
  ShapeRewardsParams common;      // its `fraction` is used where `device_fraction` is null
  const double* device_fraction;  // [1], so that a captured graph can be replayed with another
  void* workspace;                // shape_rewards_cuda_workspace(N, K) bytes, 256-byte aligned
  std::int64_t workspace_size;
  void* stream;
};

std::int64_t shape_rewards_cuda_workspace(std::int64_t num_samples, std::int64_t num_aux);

// One launch up to kOneLaunchSamples samples, sorting above. Throws std::runtime_error with CUDA's
// message when a launch fails, std::invalid_argument for a workspace that is too small.
void shape_rewards_cuda(const ShapeRewardsCudaParams& params);

}  // namespace gardo
