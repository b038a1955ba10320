// Win-rate uncertainty of the samples of one epoch, and the gate.
#pragma once

#include <cstdint>

#include "launch_limits.h"

namespace gardo {

// Which samples have a positive uncertainty: those that the proxy over-rates or under-rates.
enum class Side : int { kOver = 0, kUnder = 1 };
// Equal rewards count one half each, or rank in the order of the samples, or do not count.
enum class Ties : int { kHalf = 0, kOrdinal = 1, kStrict = 2 };
// The samples that the fraction is a share of: all, or those with U >= 0.
enum class ShareOf : int { kAll = 0, kNonnegative = 1 };
enum class RankScope : int { kBatch = 0, kGroup = 1 };

// All pointers are contiguous. N samples, K auxiliary rewards. A sample with a value that is not
// finite takes no part.
struct GateSamplesParams {
  const double* proxy;         // [N]
  const double* aux;           // [K, N]
  const std::int64_t* groups;  // [N], any values in any order
  std::int64_t num_samples;    // N
  std::int64_t num_aux;        // K
  double fraction;             // in [0, 1]
  Side side;
  Ties ties;
  ShareOf share_of;
  RankScope scope;
  int num_threads;

  double* uncertainty;       // out [N]
  std::uint8_t* gate;        // out [N]: 0 or 1
  double* threshold;         // out [1], or [N] with has_group_thresholds
  double* mean_uncertainty;  // out [1]: of the samples that the fraction is a share of
};

// Whether each group has a threshold of its own: of its samples, 0 where one takes no part.
inline bool has_group_thresholds(const GateSamplesParams& p) {
  return p.share_of == ShareOf::kAll && p.scope == RankScope::kGroup;
}

// Whether the mean U of all samples is 0, since the scores of every reward have the same mean. It
// is written as 0 then, and for strict wins comes from integers, lest rounding pass for a trend.
inline bool has_zero_mean(const GateSamplesParams& p) {
  return p.share_of == ShareOf::kAll && p.ties != Ties::kStrict;
}

void gate_samples_cpu(const GateSamplesParams& params);

// As GroupAdvantagesCudaParams: device memory, enqueued on `stream`, capturable.
struct GateSamplesCudaParams {
  GateSamplesParams common;       // its `fraction` is used where `device_fraction` is null
  const double* device_fraction;  // [1], so that a captured graph can be replayed with another
  void* workspace;                // gate_samples_cuda_workspace(N, K) bytes, 256-byte aligned
  std::int64_t workspace_size;
  void* stream;
};

// One launch up to kOneLaunchSamples samples and kOneLaunchAux auxiliaries, sorting above.
std::int64_t gate_samples_cuda_workspace(std::int64_t num_samples, std::int64_t num_aux);
void gate_samples_cuda(const GateSamplesCudaParams& params);

}  // namespace gardo
