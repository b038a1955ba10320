// Group advantages, tie-aware win rates, uncertainty and gate of one epoch, in one call.
#pragma once

#include <cstdint>

namespace gardo {

enum class AdvantageNorm : int { kNone = 0, kGroupStd = 1, kGlobalStd = 2 };
enum class GateMode : int { kPaper = 0, kOfficial = 1, kAll = 2, kOff = 3 };
enum class RankScope : int { kBatch = 0, kGroup = 1 };

// All pointers are contiguous. N samples, K auxiliary rewards.
struct ShapeRewardsParams {
  const double* proxy;         // [N]; NaN: the reward is missing
  const double* aux;           // [K, N]
  const std::int64_t* groups;  // [N], any values in any order
  const double* distance;      // [N] or null: no diversity factor
  std::int64_t num_samples;    // N
  std::int64_t num_aux;        // K
  double fraction;             // share of the non-negative uncertainties to gate, in [0, 1]
  AdvantageNorm advantage_norm;
  GateMode gate_mode;
  RankScope scope;
  int num_threads;

  double* advantage;         // out [N]
  double* uncertainty;       // out [N]
  std::uint8_t* gate;        // out [N]: 0 or 1
  double* threshold;         // out [1]
  double* mean_uncertainty;  // out [1]: mean of the non-negative uncertainties
};

// Throws std::bad_alloc when there is no memory for its O(N * (K + 4)) of workspace.
void shape_rewards_cpu(const ShapeRewardsParams& params);

}  // namespace gardo
