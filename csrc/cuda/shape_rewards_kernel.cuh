// Device code of the one-launch shape_rewards, for up to kOneLaunchSamples samples.
//
// Counting all pairs takes N^2 comparisons, which a GPU does faster than it sorts a few thousand
// numbers; every block counts for its own samples, and the block that finishes last finds the
// threshold and writes the gate. No atomics on floating point: results are reproducible.
#pragma once

#include "shape_rewards.h"

namespace gardo {
namespace one_launch {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr int kPerWarp = 4;                   // samples that a warp counts for at a time
constexpr int kPerBlock = kWarps * kPerWarp;  // samples of a block
constexpr int kTile = 128;                    // samples compared with, held in shared memory
constexpr double kStdEps = 1e-4;

// Shared memory while counting: a tile and the block's own samples.
struct Tile {
  double* rewards;   // [K + 1, kTile], proxy first
  double* distance;  // [kTile]
  double* own;       // [K + 1, kPerBlock]
  long long* group;  // [kTile]
  unsigned char* valid;

  static __host__ __device__ long long bytes(long long num_aux) {
    const long long doubles = (num_aux + 1) * (kTile + kPerBlock) + 2 * kTile;
    return doubles * static_cast<long long>(sizeof(double)) + kTile;
  }

  __device__ Tile(double* shared, long long num_aux) {
    rewards = shared;
    distance = rewards + (num_aux + 1) * kTile;
    own = distance + kTile;
    group = reinterpret_cast<long long*>(own + (num_aux + 1) * kPerBlock);
    valid = reinterpret_cast<unsigned char*>(group + kTile);
  }
};

__device__ inline double reward_of(const ShapeRewardsParams& p, long long k, long long i) {
  return k == 0 ? p.proxy[i] : p.aux[(k - 1) * p.num_samples + i];
}

__device__ inline bool is_valid(const ShapeRewardsParams& p, long long i) {
  bool ok = isfinite(p.proxy[i]);
  for (long long k = 0; k < p.num_aux; ++k) ok = ok && isfinite(p.aux[k * p.num_samples + i]);
  return ok && (p.distance == nullptr || isfinite(p.distance[i]));
}

__device__ inline void load_tile(const ShapeRewardsParams& p, const Tile& tile, long long base) {
  __syncthreads();
  for (int t = threadIdx.x; t < kTile; t += kThreads) {
    const long long j = base + t;
    const bool inside = j < p.num_samples;
    for (long long k = 0; k <= p.num_aux; ++k) {
      tile.rewards[k * kTile + t] = inside ? reward_of(p, k, j) : 0.0;
    }
    tile.distance[t] = inside && p.distance != nullptr ? p.distance[j] : 0.0;
    tile.group[t] = inside ? p.groups[j] : 0;
    tile.valid[t] = inside && is_valid(p, j);
  }
  __syncthreads();
}

template <typename T>
__device__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

// What a sample learns from comparing itself with all valid samples.
struct Counts {
  long long gap = 0;  // K * score(proxy) - sum of the auxiliaries' scores: an exact integer
  long long in_scope = 0;
  long long in_group = 0;
  double reward = 0.0;  // sums over the group
  double distance = 0.0;
  double squares = 0.0;  // of the group's or the batch's centred rewards
};

// Points that the owner of `own` gets from one rival: 2 for a win, 1 for a tie; or, for the
// official gate, 1 if the rival ranks before it (best first, ties in sample order).
__device__ inline int score(double own, double other, bool other_first, bool official) {
  if (official) return other > own || (other == own && other_first) ? 1 : 0;
  return other < own ? 2 : (other == own ? 1 : 0);
}

__device__ inline void count_tile(const ShapeRewardsParams& p, const Tile& tile, long long base,
                                  const long long (&samples)[kPerWarp],
                                  const long long (&groups)[kPerWarp], int own_base,
                                  Counts (&counts)[kPerWarp]) {
  const bool official = p.gate_mode == GateMode::kOfficial;
  for (int t = threadIdx.x % kWarp; t < kTile; t += kWarp) {
    if (!tile.valid[t]) continue;
    for (int s = 0; s < kPerWarp; ++s) {
      const bool same = tile.group[t] == groups[s];
      Counts& c = counts[s];
      if (same) {
        ++c.in_group;
        c.reward += tile.rewards[t];
        c.distance += tile.distance[t];
      }
      if (!same && p.scope == RankScope::kGroup) continue;
      ++c.in_scope;
      if (base + t == samples[s]) continue;
      const bool first = base + t < samples[s];
      for (long long k = 0; k <= p.num_aux; ++k) {
        const double own = tile.own[k * kPerBlock + own_base + s];
        const int points = score(own, tile.rewards[k * kTile + t], first, official);
        c.gap += (k == 0 ? p.num_aux : -1) * points;
      }
    }
  }
}

// Writes advantage and uncertainty of sample i, and whether it is valid into its gate.
__device__ inline void write_sample(const ShapeRewardsParams& p, long long i, const Counts& c,
                                    double mean, double scale) {
  const bool valid = is_valid(p, i);
  p.gate[i] = valid;
  p.advantage[i] = 0.0;
  p.uncertainty[i] = 0.0;
  if (!valid) return;
  double advantage = (p.proxy[i] - mean) / scale;
  if (p.distance != nullptr && advantage >= 0.0) {
    const double mean_distance = c.distance / static_cast<double>(c.in_group);
    if (mean_distance > 0.0) advantage *= p.distance[i] / mean_distance;
  }
  p.advantage[i] = advantage;
  if (p.num_aux == 0) return;
  const bool official = p.gate_mode == GateMode::kOfficial;
  const long long rivals = c.in_scope - 1;
  const long long unit = official ? p.num_aux : 2 * (rivals > 0 ? rivals : 1) * p.num_aux;
  p.uncertainty[i] = static_cast<double>(c.gap) / static_cast<double>(unit);
}

__device__ inline void shape_block(const ShapeRewardsParams& p, double* shared) {
  const Tile tile(shared, p.num_aux);
  const int warp = threadIdx.x / kWarp;
  const int own_base = warp * kPerWarp;
  const long long block_first = static_cast<long long>(blockIdx.x) * kPerBlock;
  for (long long t = threadIdx.x; t < (p.num_aux + 1) * kPerBlock; t += kThreads) {
    const long long i = block_first + t % kPerBlock;
    tile.own[t] = i < p.num_samples ? reward_of(p, t / kPerBlock, i) : 0.0;
  }
  long long samples[kPerWarp];
  long long groups[kPerWarp];
  Counts counts[kPerWarp];
  for (int s = 0; s < kPerWarp; ++s) {
    samples[s] = block_first + own_base + s;
    groups[s] = samples[s] < p.num_samples ? p.groups[samples[s]] : 0;
  }

  double batch_reward = 0.0;
  long long batch_count = 0;
  for (long long base = 0; base < p.num_samples; base += kTile) {
    load_tile(p, tile, base);
    count_tile(p, tile, base, samples, groups, own_base, counts);
    for (int t = threadIdx.x % kWarp; t < kTile; t += kWarp) {
      if (!tile.valid[t]) continue;
      batch_reward += tile.rewards[t];
      ++batch_count;
    }
  }
  batch_count = warp_sum(batch_count);
  const double batch_mean =
      warp_sum(batch_reward) / static_cast<double>(batch_count > 0 ? batch_count : 1);
  double mean[kPerWarp];
  for (int s = 0; s < kPerWarp; ++s) {
    Counts& c = counts[s];
    c.gap = warp_sum(c.gap);
    c.in_scope = warp_sum(c.in_scope);
    c.in_group = warp_sum(c.in_group);
    c.distance = warp_sum(c.distance);
    mean[s] = warp_sum(c.reward) / static_cast<double>(c.in_group > 0 ? c.in_group : 1);
  }

  const bool global = p.advantage_norm == AdvantageNorm::kGlobalStd;
  if (p.advantage_norm != AdvantageNorm::kNone) {
    for (long long base = 0; base < p.num_samples; base += kTile) {
      load_tile(p, tile, base);
      for (int t = threadIdx.x % kWarp; t < kTile; t += kWarp) {
        if (!tile.valid[t]) continue;
        for (int s = 0; s < kPerWarp; ++s) {
          if (!global && tile.group[t] != groups[s]) continue;
          const double centred = tile.rewards[t] - (global ? batch_mean : mean[s]);
          counts[s].squares += centred * centred;
        }
      }
    }
  }
  for (int s = 0; s < kPerWarp; ++s) {
    const double squares = warp_sum(counts[s].squares);
    if (threadIdx.x % kWarp != 0 || samples[s] >= p.num_samples) continue;
    const long long n = global ? batch_count : counts[s].in_group;
    const double scale = p.advantage_norm == AdvantageNorm::kNone
                             ? 1.0
                             : sqrt(squares / static_cast<double>(n > 0 ? n : 1)) + kStdEps;
    write_sample(p, samples[s], counts[s], mean[s], scale);
  }
}

// Ascending, by all threads of the block; `size` is a power of two.
__device__ inline void bitonic_sort(double* values, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int t = threadIdx.x; t < size / 2; t += kThreads) {
        const int i = 2 * t - (t & (step - 1));
        const bool ascending = (i & run) == 0;
        const double a = values[i], b = values[i + step];
        if ((a > b) == ascending) {
          values[i] = b;
          values[i + step] = a;
        }
      }
    }
  }
  __syncthreads();
}

// Reads what other blocks wrote, hence past the first-level cache.
__device__ inline void gate_block(const ShapeRewardsParams& p, double fraction, double* shared,
                                  int padded) {
  double* ordered = shared;  // [padded]
  double* sums = shared + padded;
  long long* numbers = reinterpret_cast<long long*>(sums + kThreads);
  double sum = 0.0;
  long long number = 0;
  for (int i = threadIdx.x; i < padded; i += kThreads) {
    ordered[i] = HUGE_VAL;
    if (i >= p.num_samples || !__ldcg(p.gate + i)) continue;
    const double u = __ldcg(p.uncertainty + i);
    if (!(u >= 0.0)) continue;
    ordered[i] = u;
    sum += u;
    ++number;
  }
  sums[threadIdx.x] = sum;
  numbers[threadIdx.x] = number;
  bitonic_sort(ordered, padded);
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) {
      sums[threadIdx.x] += sums[threadIdx.x + step];
      numbers[threadIdx.x] += numbers[threadIdx.x + step];
    }
    __syncthreads();
  }
  number = numbers[0];
  double threshold = 0.0;
  if (number > 0) {
    const double position = (1.0 - fraction) * static_cast<double>(number - 1);
    const auto lower = static_cast<long long>(position);
    const double low = ordered[lower];
    const double high = ordered[lower + 1 < number ? lower + 1 : lower];
    const double weight = position - static_cast<double>(lower);
    threshold = weight < 0.5 ? low + (high - low) * weight : high - (high - low) * (1.0 - weight);
  }
  if (threadIdx.x == 0) {
    *p.threshold = threshold;
    *p.mean_uncertainty = number > 0 ? sums[0] / static_cast<double>(number) : 0.0;
  }
  for (long long i = threadIdx.x; i < p.num_samples; i += kThreads) {
    const bool valid = __ldcg(p.gate + i) != 0;
    bool gated = false;
    if (p.gate_mode == GateMode::kAll) gated = valid;
    if (p.gate_mode == GateMode::kPaper || p.gate_mode == GateMode::kOfficial) {
      gated = valid && __ldcg(p.uncertainty + i) > threshold;
    }
    p.gate[i] = gated;
  }
}

// Shared memory: the larger of the two phases.
inline long long shared_bytes(long long num_aux, long long padded) {
  const long long gate = (padded + kThreads) * static_cast<long long>(sizeof(double)) +
                         kThreads * static_cast<long long>(sizeof(long long));
  const long long tile = Tile::bytes(num_aux);
  return gate > tile ? gate : tile;
}

}  // namespace one_launch
}  // namespace gardo
