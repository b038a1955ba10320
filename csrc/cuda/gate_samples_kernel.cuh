// Device code of the gate in one launch: every block counts for its own samples, and the block that
// finishes last finds the thresholds and writes the gate.
#pragma once

#include "gate_samples.h"
#include "one_launch.cuh"

namespace gardo {
namespace gating {

__device__ inline double reward_of(const GateSamplesParams& p, long long k, long long i) {
  return k == 0 ? p.proxy[i] : p.aux[(k - 1) * p.num_samples + i];
}

__device__ inline bool takes_part(const GateSamplesParams& p, long long i) {
  bool ok = true;
  for (long long k = 0; k <= p.num_aux; ++k) ok = ok && isfinite(reward_of(p, k, i));
  return ok;
}

// What a gap of 1 is worth among `count` ranked samples.
__device__ inline double unit_of(const GateSamplesParams& p, long long count) {
  if (p.ties == Ties::kOrdinal) return static_cast<double>(p.num_aux);
  const long long against = p.ties == Ties::kHalf ? count - 1 : count;
  return static_cast<double>(2 * (against > 0 ? against : 1) * p.num_aux);
}

__device__ inline double interpolated(double low, double high, double weight) {
  return weight < 0.5 ? low + (high - low) * weight : high - (high - low) * (1.0 - weight);
}

__device__ inline double nearest(double value) {
  return floor(value + 0.5);
}

namespace one_launch {

using namespace gardo::one_launch;

// With a threshold per group, samples are sorted by one number, an exact integer: the first sample
// of their group, then the gap, which is below kGapRange / 2 in size (kOneLaunchSamples wins,
// twice, by each of kOneLaunchAux auxiliaries).
constexpr double kGapRange = 4.0 * kOneLaunchSamples * kOneLaunchAux;

// Shared memory while counting: a tile and the block's own samples.
struct Tile {
  double* rewards;   // [K + 1, kTile], proxy first
  double* own;       // [K + 1, kPerBlock]
  long long* group;  // [kTile]
  unsigned char* valid;

  static __host__ __device__ long long bytes(long long num_aux) {
    const long long doubles = (num_aux + 1) * (kTile + kPerBlock) + kTile;
    return doubles * static_cast<long long>(sizeof(double)) + kTile;
  }

  __device__ Tile(double* shared, long long num_aux) {
    rewards = shared;
    own = rewards + (num_aux + 1) * kTile;
    group = reinterpret_cast<long long*>(own + (num_aux + 1) * kPerBlock);
    valid = reinterpret_cast<unsigned char*>(group + kTile);
  }
};

__device__ inline void load_tile(const GateSamplesParams& p, const Tile& tile, long long base) {
  __syncthreads();
  for (int t = threadIdx.x; t < kTile; t += kThreads) {
    const long long j = base + t;
    const bool inside = j < p.num_samples;
    for (long long k = 0; k <= p.num_aux; ++k) {
      tile.rewards[k * kTile + t] = inside ? reward_of(p, k, j) : 0.0;
    }
    tile.group[t] = inside ? p.groups[j] : 0;
    tile.valid[t] = inside && takes_part(p, j);
  }
  __syncthreads();
}

// What a sample learns from comparing itself with all valid samples of its scope.
struct Counts {
  long long gap = 0;  // K * score(proxy) - sum of the auxiliaries' scores: an exact integer
  long long rivals = 0;
  long long first = kOneLaunchSamples;  // of the scope
};

// Points that the owner of `own` gets from one rival: 2 for a win, 1 for a tie, 0 with strict wins;
// or, with ordinal ranks, 1 if the rival ranks before it, ties in sample order. A win is to be
// above the rival, or below where the samples of interest are the under-rated ones.
__device__ inline int score(const GateSamplesParams& p, double own, double other,
                            bool other_first) {
  const bool win = p.side == Side::kUnder ? other > own : other < own;
  if (p.ties == Ties::kOrdinal) return win || (other == own && other_first) ? 1 : 0;
  return win ? 2 : (other == own && p.ties == Ties::kHalf ? 1 : 0);
}

__device__ inline void count_tile(const GateSamplesParams& p, const Tile& tile, long long base,
                                  long long first, const long long (&groups)[kPerWarp],
                                  int own_base, Counts (&counts)[kPerWarp]) {
  for (int t = threadIdx.x % kWarp; t < kTile; t += kWarp) {
    if (!tile.valid[t]) continue;
    const long long j = base + t;
    for (int s = 0; s < kPerWarp; ++s) {
      if (p.scope == RankScope::kGroup && tile.group[t] != groups[s]) continue;
      Counts& c = counts[s];
      if (j < c.first) c.first = j;
      if (j == first + s) continue;
      ++c.rivals;
      for (long long k = 0; k <= p.num_aux; ++k) {
        const double own = tile.own[k * kPerBlock + own_base + s];
        const int points = score(p, own, tile.rewards[k * kTile + t], j < first + s);
        c.gap += (k == 0 ? p.num_aux : -1) * points;
      }
    }
  }
}

__device__ inline void count_block(const GateSamplesParams& p, bool group_thresholds,
                                   double* shared) {
  const Tile tile(shared, p.num_aux);
  const int own_base = threadIdx.x / kWarp * kPerWarp;
  const long long block_first = static_cast<long long>(blockIdx.x) * kPerBlock;
  for (long long t = threadIdx.x; t < (p.num_aux + 1) * kPerBlock; t += kThreads) {
    const long long i = block_first + t % kPerBlock;
    tile.own[t] = i < p.num_samples ? reward_of(p, t / kPerBlock, i) : 0.0;
  }
  const long long first = block_first + own_base;
  long long groups[kPerWarp];
  Counts counts[kPerWarp];
  for (int s = 0; s < kPerWarp; ++s) {
    groups[s] = first + s < p.num_samples ? p.groups[first + s] : 0;
  }
  for (long long base = 0; base < p.num_samples; base += kTile) {
    load_tile(p, tile, base);
    count_tile(p, tile, base, first, groups, own_base, counts);
  }
  for (int s = 0; s < kPerWarp; ++s) {
    Counts& c = counts[s];
    c.gap = warp_sum(c.gap);
    c.rivals = warp_sum(c.rivals);
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const long long other = __shfl_xor_sync(0xffffffffu, c.first, step);
      c.first = other < c.first ? other : c.first;
    }
    const long long i = first + s;
    if (threadIdx.x % kWarp != 0 || i >= p.num_samples) continue;
    const bool valid = takes_part(p, i);
    const double unit = unit_of(p, c.rivals + 1);
    p.gate[i] = valid;
    p.uncertainty[i] = valid && p.num_aux > 0 ? static_cast<double>(c.gap) / unit : 0.0;
    // For the last block, which then writes the threshold there.
    if (group_thresholds) {
      p.threshold[i] = static_cast<double>(c.first) * kGapRange + static_cast<double>(c.gap);
    }
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

// The totals of [kThreads] of each into the first, in a fixed order.
__device__ inline void add_up(double* sums, long long* numbers) {
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) {
      sums[threadIdx.x] += sums[threadIdx.x + step];
      numbers[threadIdx.x] += numbers[threadIdx.x + step];
    }
    __syncthreads();
  }
}

__device__ inline int lower_bound(const double* values, int size, double value) {
  int begin = 0, end = size;
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (values[middle] < value) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// The functions below read what other blocks wrote, hence past the first-level cache.

// One threshold, of all samples or of those with U >= 0.
__device__ inline void gate_batch(const GateSamplesParams& p, bool zero_mean, double fraction,
                                  double* shared, int padded) {
  double* ordered = shared;  // [padded]
  double* sums = shared + padded;
  long long* numbers = reinterpret_cast<long long*>(sums + kThreads);
  const bool all = p.share_of == ShareOf::kAll;
  double sum = 0.0;
  long long number = 0;
  for (int i = threadIdx.x; i < padded; i += kThreads) {
    ordered[i] = HUGE_VAL;
    if (i >= p.num_samples || !__ldcg(p.gate + i)) continue;
    const double u = __ldcg(p.uncertainty + i);
    if (!all && !(u >= 0.0)) continue;
    ordered[i] = u;
    sum += u;
    ++number;
  }
  sums[threadIdx.x] = sum;
  numbers[threadIdx.x] = number;
  bitonic_sort(ordered, padded);
  add_up(sums, numbers);
  number = numbers[0];
  double threshold = 0.0;
  if (number > 0) {
    const double position = (1.0 - fraction) * static_cast<double>(number - 1);
    const auto lower = static_cast<long long>(position);
    threshold = interpolated(ordered[lower], ordered[lower + 1 < number ? lower + 1 : lower],
                             position - static_cast<double>(lower));
  }
  if (threadIdx.x == 0) {
    *p.threshold = threshold;
    double total = zero_mean || number == 0 ? 0.0 : sums[0];
    // The sum of the gaps is an integer: without the rounding of the single U.
    if (all && p.num_aux > 0) total = nearest(total * unit_of(p, number)) / unit_of(p, number);
    *p.mean_uncertainty = number == 0 ? 0.0 : total / static_cast<double>(number);
  }
  for (long long i = threadIdx.x; i < p.num_samples; i += kThreads) {
    p.gate[i] = __ldcg(p.gate + i) != 0 && __ldcg(p.uncertainty + i) > threshold;
  }
}

// A threshold for each group.
__device__ inline void gate_groups(const GateSamplesParams& p, bool zero_mean, double fraction,
                                   double* shared, int padded) {
  double* ordered = shared;  // [padded]
  double* sums = shared + padded;
  long long* numbers = reinterpret_cast<long long*>(sums + kThreads);
  double sum = 0.0;
  long long number = 0;
  for (int i = threadIdx.x; i < padded; i += kThreads) {
    const bool valid = i < p.num_samples && __ldcg(p.gate + i) != 0;
    ordered[i] = valid ? __ldcg(p.threshold + i) : HUGE_VAL;
  }
  bitonic_sort(ordered, padded);
  for (long long i = threadIdx.x; i < p.num_samples; i += kThreads) {
    double threshold = 0.0;
    bool gated = false;
    if (__ldcg(p.gate + i) != 0 && p.num_aux > 0) {
      const double first = nearest(__ldcg(p.threshold + i) / kGapRange);
      const double group = first * kGapRange;
      const int begin = lower_bound(ordered, padded, group - kGapRange / 2);
      const int count = lower_bound(ordered, padded, group + kGapRange / 2) - begin;
      const double position = (1.0 - fraction) * static_cast<double>(count - 1);
      const int lower = static_cast<int>(position);
      const int upper = lower + 1 < count ? lower + 1 : lower;
      const double unit = unit_of(p, count);
      threshold = interpolated((ordered[begin + lower] - group) / unit,
                               (ordered[begin + upper] - group) / unit,
                               position - static_cast<double>(lower));
      gated = __ldcg(p.uncertainty + i) > threshold;
      ++number;
      if (!zero_mean && first == static_cast<double>(i)) {  // for the whole group
        double gaps = 0.0;
        for (int q = begin; q < begin + count; ++q) gaps += ordered[q] - group;
        sum += gaps / unit;
      }
    }
    p.threshold[i] = threshold;
    p.gate[i] = gated;
  }
  sums[threadIdx.x] = sum;
  numbers[threadIdx.x] = number;
  add_up(sums, numbers);
  if (threadIdx.x == 0) {
    *p.mean_uncertainty = numbers[0] == 0 ? 0.0 : sums[0] / static_cast<double>(numbers[0]);
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
}  // namespace gating
}  // namespace gardo
