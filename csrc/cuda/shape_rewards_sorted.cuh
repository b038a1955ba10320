// shape_rewards for many samples: ranks by stable radix sorts (CUB), O(K N log N).
//
// All sizes that depend on the data stay on the device, so nothing waits for the host. Every sum is
// over a fixed order, and integers carry the ranks, so results are reproducible.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>

#include "launch.cuh"
#include "shape_rewards.h"
#include "shape_rewards_kernel.cuh"
#include "sorting.cuh"

namespace gardo {
namespace sorted {

constexpr std::int64_t kGroupBlocks = 1024;  // at most; each takes one group after the other

// Temporary arrays; `counters` holds the number of groups and of valid samples.
struct Workspace {
  Key* group_key;            // [N] by sample
  Key* sorted_group;         // [N] ascending
  Key* key_in;               // [N]
  Key* key_out;              // [N]
  Key* key_regroup;          // [N]
  long long* gap;            // [N] by sample
  Index* iota;               // [N] 0, 1, ...
  Index* by_group;           // [N] samples in the order of sorted_group
  Index* start;              // [N] first position of each group
  Index* order;              // [N]
  Index* regroup;            // [N]
  Index* in_scope;           // [N] valid samples of the scope of each sample
  std::uint8_t* valid;       // [N]
  std::uint8_t* group_edge;  // [N]
  Index* counters;           // [2]
  double* moments;           // [2] of the batch: mean, standard deviation
  void* cub;
  std::size_t cub_bytes;
};

inline Workspace carve(Pieces& pieces, std::int64_t n) {
  Workspace w;
  w.group_key = pieces.take<Key>(n);
  w.sorted_group = pieces.take<Key>(n);
  w.key_in = pieces.take<Key>(n);
  w.key_out = pieces.take<Key>(n);
  w.key_regroup = pieces.take<Key>(n);
  w.gap = pieces.take<long long>(n);
  w.iota = pieces.take<Index>(n);
  w.by_group = pieces.take<Index>(n);
  w.start = pieces.take<Index>(n);
  w.order = pieces.take<Index>(n);
  w.regroup = pieces.take<Index>(n);
  w.in_scope = pieces.take<Index>(n);
  w.valid = pieces.take<std::uint8_t>(n);
  w.group_edge = pieces.take<std::uint8_t>(n);
  w.counters = pieces.take<Index>(2);
  w.moments = pieces.take<double>(2);
  w.cub_bytes = cub_bytes(n);
  w.cub = pieces.take<char>(static_cast<std::int64_t>(w.cub_bytes));
  return w;
}

inline std::int64_t workspace_bytes(std::int64_t n) {
  Pieces pieces(nullptr);
  carve(pieces, n);
  return pieces.used();
}

__global__ void prepare(const ShapeRewardsParams p, Workspace w) {
  const Index i = position();
  if (i >= p.num_samples) return;
  w.valid[i] = one_launch::is_valid(p, i);
  w.group_key[i] = static_cast<Key>(p.groups[i]) ^ (Key{1} << 63);
  w.iota[i] = i;
  w.gap[i] = 0;
  if (w.valid[i]) atomicAdd(w.counters + 1, Index{1});
}

__global__ void find_edges(Index n, Workspace w) {
  const Index q = position();
  if (q >= n) return;
  w.group_edge[q] = q == 0 || w.sorted_group[q] != w.sorted_group[q - 1];
}

// Sum over a block in a fixed order, given to all its threads.
template <typename T>
__device__ T block_sum(T value) {
  __shared__ T sums[kThreads];
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    __syncthreads();
  }
  const T total = sums[0];
  __syncthreads();
  return total;
}

// One block: mean and standard deviation of all valid proxy rewards, for `global_std`.
__global__ void batch_moments(const ShapeRewardsParams p, Workspace w) {
  double sum = 0.0;
  for (Index i = threadIdx.x; i < p.num_samples; i += kThreads) {
    if (w.valid[i]) sum += p.proxy[i];
  }
  const double count = w.counters[1] > 0 ? w.counters[1] : 1;
  const double mean = block_sum(sum) / count;
  double squares = 0.0;
  for (Index i = threadIdx.x; i < p.num_samples; i += kThreads) {
    if (w.valid[i]) squares += (p.proxy[i] - mean) * (p.proxy[i] - mean);
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) w.moments[1] = sqrt(squares / count);
}

// One block per group at a time: advantages, and the number of valid members.
__global__ void group_advantages(const ShapeRewardsParams p, Workspace w) {
  const Index groups = w.counters[0];
  for (Index g = blockIdx.x; g < groups; g += gridDim.x) {
    const Index begin = w.start[g];
    const Index end = g + 1 < groups ? w.start[g + 1] : static_cast<Index>(p.num_samples);
    double reward = 0.0, distance = 0.0;
    Index count = 0;
    for (Index q = begin + threadIdx.x; q < end; q += kThreads) {
      const Index i = w.by_group[q];
      if (!w.valid[i]) continue;
      reward += p.proxy[i];
      if (p.distance != nullptr) distance += p.distance[i];
      ++count;
    }
    count = block_sum(count);
    const double members = count > 0 ? count : 1;
    const double mean = block_sum(reward) / members;
    const double mean_distance = block_sum(distance) / members;
    double scale = 1.0;
    if (p.advantage_norm == AdvantageNorm::kGlobalStd) scale = w.moments[1] + one_launch::kStdEps;
    if (p.advantage_norm == AdvantageNorm::kGroupStd) {
      double squares = 0.0;
      for (Index q = begin + threadIdx.x; q < end; q += kThreads) {
        const Index i = w.by_group[q];
        if (w.valid[i]) squares += (p.proxy[i] - mean) * (p.proxy[i] - mean);
      }
      scale = sqrt(block_sum(squares) / members) + one_launch::kStdEps;
    }
    for (Index q = begin + threadIdx.x; q < end; q += kThreads) {
      const Index i = w.by_group[q];
      w.in_scope[i] = p.scope == RankScope::kGroup ? count : w.counters[1];
      double advantage = w.valid[i] ? (p.proxy[i] - mean) / scale : 0.0;
      if (w.valid[i] && mean_distance > 0.0 && advantage >= 0.0) {
        advantage *= p.distance[i] / mean_distance;
      }
      p.advantage[i] = advantage;
    }
  }
}

__global__ void reward_keys(const ShapeRewardsParams p, Workspace w, std::int64_t k) {
  const Index i = position();
  if (i >= p.num_samples) return;
  const Key key = w.valid[i] ? key_of(one_launch::reward_of(p, k, i)) : kMissing;
  const bool descending = p.gate_mode == GateMode::kOfficial;
  w.key_in[i] = descending && w.valid[i] ? ~key : key;
}

// Adds the score of reward k to the gap of each sample. Without groups the sorted keys are key_out
// and `order`; with groups position q of the regrouped order is position regroup[q] of those.
__global__ void add_scores(const ShapeRewardsParams p, Workspace w, std::int64_t k, bool grouped) {
  const Index q = position();
  const auto n = static_cast<Index>(p.num_samples);
  if (q >= n) return;
  const Key* keys = grouped ? w.key_in : w.key_out;
  const Index i = grouped ? w.order[w.regroup[q]] : w.order[q];
  if (!w.valid[i]) return;
  Index begin = 0, end = n;
  if (grouped) {
    begin = lower_bound(w.sorted_group, 0, n, w.group_key[i]);
    end = upper_bound(w.sorted_group, begin, n, w.group_key[i]);
  }
  long long score = q - begin + 1;  // rank, best first
  if (p.gate_mode != GateMode::kOfficial) {
    const Index tie_begin = lower_bound(keys, begin, end, keys[q]);
    const Index tie_end = upper_bound(keys, tie_begin, end, keys[q]);
    score = 2LL * (tie_begin - begin) + (tie_end - tie_begin) - 1;
  }
  w.gap[i] += (k == 0 ? p.num_aux : -1) * score;
}

// Uncertainty of each sample, and the key of a non-negative one.
__global__ void uncertainties(const ShapeRewardsParams p, Workspace w) {
  const Index i = position();
  if (i >= p.num_samples) return;
  double u = 0.0;
  if (w.valid[i] && p.num_aux > 0) {
    const long long rivals = static_cast<long long>(w.in_scope[i]) - 1;
    const long long unit =
        p.gate_mode == GateMode::kOfficial ? p.num_aux : 2 * (rivals > 0 ? rivals : 1) * p.num_aux;
    u = static_cast<double>(w.gap[i]) / static_cast<double>(unit);
  }
  p.uncertainty[i] = u;
  w.key_in[i] = w.valid[i] && u >= 0.0 ? key_of(u) : kMissing;
}

// One block: threshold and mean of the sorted non-negative uncertainties.
__global__ void find_threshold(const ShapeRewardsParams p, Workspace w,
                               const double* device_fraction) {
  const auto n = static_cast<Index>(p.num_samples);
  const Index count = lower_bound(w.key_out, 0, n, kMissing);
  double sum = 0.0;
  for (Index q = threadIdx.x; q < count; q += kThreads) sum += value_of(w.key_out[q]);
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  *p.mean_uncertainty = count > 0 ? sum / static_cast<double>(count) : 0.0;
  *p.threshold = 0.0;
  if (count == 0) return;
  const double fraction = device_fraction == nullptr ? p.fraction : *device_fraction;
  const double at = (1.0 - fraction) * static_cast<double>(count - 1);
  const auto lower = static_cast<Index>(at);
  const double low = value_of(w.key_out[lower]);
  const double high = value_of(w.key_out[lower + 1 < count ? lower + 1 : lower]);
  const double weight = at - static_cast<double>(lower);
  *p.threshold = weight < 0.5 ? low + (high - low) * weight : high - (high - low) * (1.0 - weight);
}

__global__ void write_gate(const ShapeRewardsParams p, Workspace w) {
  const Index i = position();
  if (i >= p.num_samples) return;
  bool gated = false;
  if (p.gate_mode == GateMode::kAll) gated = w.valid[i];
  if (p.gate_mode == GateMode::kPaper || p.gate_mode == GateMode::kOfficial) {
    gated = w.valid[i] && p.uncertainty[i] > *p.threshold;
  }
  p.gate[i] = gated;
}

inline void shape(const ShapeRewardsCudaParams& params) {
  const ShapeRewardsParams& p = params.common;
  const std::int64_t n = p.num_samples;
  if (n < 1) throw std::invalid_argument("num_samples: expected >= 1");
  if (n > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("num_samples: expected at most 2^31 - 1 on a GPU");
  }
  const auto stream = static_cast<cudaStream_t>(params.stream);
  Pieces pieces(params.workspace);
  const Workspace w = carve(pieces, n);
  const auto size = static_cast<Index>(n);
  const auto blocks = static_cast<unsigned int>((n + kThreads - 1) / kThreads);

  check(cudaMemsetAsync(w.counters, 0, 2 * sizeof(Index), stream));
  launch(prepare, blocks, kThreads, 0, stream, p, w);
  sort_pairs(w.cub, w.cub_bytes, w.group_key, w.sorted_group, w.iota, w.by_group, n, stream);
  launch(find_edges, blocks, kThreads, 0, stream, size, w);
  std::size_t bytes = w.cub_bytes;
  check(cub::DeviceSelect::Flagged(w.cub, bytes, w.iota, w.group_edge, w.start, w.counters, n,
                                   stream));
  if (p.advantage_norm == AdvantageNorm::kGlobalStd) {
    launch(batch_moments, 1, kThreads, 0, stream, p, w);
  }
  const auto group_blocks = static_cast<unsigned int>(n < kGroupBlocks ? n : kGroupBlocks);
  launch(group_advantages, group_blocks, kThreads, 0, stream, p, w);

  const bool grouped = p.scope == RankScope::kGroup;
  for (std::int64_t k = 0; p.num_aux > 0 && k <= p.num_aux; ++k) {
    launch(reward_keys, blocks, kThreads, 0, stream, p, w, k);
    sort_pairs(w.cub, w.cub_bytes, w.key_in, w.key_out, w.iota, w.order, n, stream);
    if (grouped) {
      launch(gather, blocks, kThreads, 0, stream, size, w.group_key, w.order, w.key_regroup);
      // The sorted group keys are known already; key_in is free to receive them again.
      sort_pairs(w.cub, w.cub_bytes, w.key_regroup, w.key_in, w.iota, w.regroup, n, stream);
      launch(gather, blocks, kThreads, 0, stream, size, w.key_out, w.regroup, w.key_in);
    }
    launch(add_scores, blocks, kThreads, 0, stream, p, w, k, grouped);
  }

  launch(uncertainties, blocks, kThreads, 0, stream, p, w);
  bytes = w.cub_bytes;
  check(cub::DeviceRadixSort::SortKeys(w.cub, bytes, w.key_in, w.key_out, n, 0, 64, stream));
  launch(find_threshold, 1, kThreads, 0, stream, p, w, params.device_fraction);
  launch(write_gate, blocks, kThreads, 0, stream, p, w);
}

}  // namespace sorted
}  // namespace gardo
