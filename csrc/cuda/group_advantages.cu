#include "group_advantages.h"

#include <cuda_runtime.h>

#include <cmath>
#include <limits>
#include <stdexcept>

#include "launch.cuh"
#include "one_launch.cuh"
#include "sorting.cuh"

namespace gardo {
namespace advantages {

constexpr double kStdEps = 1e-4;

__device__ inline bool takes_part(const GroupAdvantagesParams& p, std::int64_t i) {
  return isfinite(p.proxy[i]) && (p.distance == nullptr || isfinite(p.distance[i]));
}

// ---- one launch ---------------------------------------------------------------------------------

struct Tile {
  double reward[one_launch::kTile];
  double distance[one_launch::kTile];
  std::int64_t group[one_launch::kTile];
  bool valid[one_launch::kTile];
};

__device__ inline void load_tile(const GroupAdvantagesParams& p, Tile& tile, std::int64_t base) {
  __syncthreads();
  for (int t = threadIdx.x; t < one_launch::kTile; t += one_launch::kThreads) {
    const std::int64_t j = base + t;
    const bool inside = j < p.num_samples;
    tile.reward[t] = inside ? p.proxy[j] : 0.0;
    tile.distance[t] = inside && p.distance != nullptr ? p.distance[j] : 0.0;
    tile.group[t] = inside ? p.groups[j] : 0;
    tile.valid[t] = inside && takes_part(p, j);
  }
  __syncthreads();
}

// Sums over the valid members of a group.
struct Sums {
  long long count = 0;
  double reward = 0.0;
  double distance = 0.0;
  double squares = 0.0;  // of the group's or the batch's centred rewards
};

__global__ void __launch_bounds__(one_launch::kThreads)
    sum_and_write(const GroupAdvantagesParams p) {
  using namespace one_launch;
  __shared__ Tile tile;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t first =
      static_cast<std::int64_t>(blockIdx.x) * kPerBlock + threadIdx.x / kWarp * kPerWarp;
  std::int64_t groups[kPerWarp];
  for (int s = 0; s < kPerWarp; ++s) {
    groups[s] = first + s < p.num_samples ? p.groups[first + s] : 0;
  }
  Sums sums[kPerWarp], batch;
  for (std::int64_t base = 0; base < p.num_samples; base += kTile) {
    load_tile(p, tile, base);
    for (int t = lane; t < kTile; t += kWarp) {
      if (!tile.valid[t]) continue;
      batch.reward += tile.reward[t];
      ++batch.count;
      for (int s = 0; s < kPerWarp; ++s) {
        if (tile.group[t] != groups[s]) continue;
        ++sums[s].count;
        sums[s].reward += tile.reward[t];
        sums[s].distance += tile.distance[t];
      }
    }
  }
  batch.count = warp_sum(batch.count);
  const double batch_mean =
      warp_sum(batch.reward) / static_cast<double>(batch.count > 0 ? batch.count : 1);
  double mean[kPerWarp], mean_distance[kPerWarp];
  for (int s = 0; s < kPerWarp; ++s) {
    sums[s].count = warp_sum(sums[s].count);
    const double members = static_cast<double>(sums[s].count > 0 ? sums[s].count : 1);
    mean[s] = warp_sum(sums[s].reward) / members;
    mean_distance[s] = warp_sum(sums[s].distance) / members;
  }

  const bool global = p.norm == AdvantageNorm::kGlobalStd;
  if (p.norm != AdvantageNorm::kNone) {
    for (std::int64_t base = 0; base < p.num_samples; base += kTile) {
      load_tile(p, tile, base);
      for (int t = lane; t < kTile; t += kWarp) {
        if (!tile.valid[t]) continue;
        for (int s = 0; s < kPerWarp; ++s) {
          if (!global && tile.group[t] != groups[s]) continue;
          const double centred = tile.reward[t] - (global ? batch_mean : mean[s]);
          sums[s].squares += centred * centred;
        }
      }
    }
  }
  for (int s = 0; s < kPerWarp; ++s) {
    const double squares = warp_sum(sums[s].squares);
    const std::int64_t i = first + s;
    if (lane != 0 || i >= p.num_samples) continue;
    const long long n = global ? batch.count : sums[s].count;
    const double scale = p.norm == AdvantageNorm::kNone
                             ? 1.0
                             : sqrt(squares / static_cast<double>(n > 0 ? n : 1)) + kStdEps;
    p.advantage[i] = takes_part(p, i) ? advantage_of(p, i, mean[s], scale, mean_distance[s]) : 0.0;
  }
}

// ---- sorted by group ----------------------------------------------------------------------------

using sorted::Index;
using sorted::Key;
using sorted::kThreads;

constexpr std::int64_t kGroupBlocks = 1024;  // at most; each takes one group after the other

struct Workspace {
  Key* group_key;            // [N] by sample
  Key* sorted_group;         // [N] ascending
  Index* iota;               // [N] 0, 1, ...
  Index* by_group;           // [N] samples in the order of sorted_group
  Index* start;              // [N] first position of each group
  std::uint8_t* valid;       // [N]
  std::uint8_t* group_edge;  // [N]
  Index* counters;           // [2]: groups, valid samples
  double* deviation;         // [1] of the batch
  void* cub;
  std::size_t cub_bytes;
};

inline Workspace divide(sorted::Pieces& pieces, std::int64_t n) {
  Workspace w;
  w.group_key = pieces.take<Key>(n);
  w.sorted_group = pieces.take<Key>(n);
  w.iota = pieces.take<Index>(n);
  w.by_group = pieces.take<Index>(n);
  w.start = pieces.take<Index>(n);
  w.valid = pieces.take<std::uint8_t>(n);
  w.group_edge = pieces.take<std::uint8_t>(n);
  w.counters = pieces.take<Index>(2);
  w.deviation = pieces.take<double>(1);
  w.cub_bytes = sorted::cub_bytes(n);
  w.cub = pieces.take<char>(static_cast<std::int64_t>(w.cub_bytes));
  return w;
}

__global__ void prepare(const GroupAdvantagesParams p, Workspace w) {
  const Index i = sorted::position();
  if (i >= p.num_samples) return;
  w.valid[i] = takes_part(p, i);
  w.group_key[i] = sorted::group_key(p.groups[i]);
  w.iota[i] = i;
  if (w.valid[i]) atomicAdd(w.counters + 1, Index{1});
}

__global__ void find_edges(Index n, Workspace w) {
  const Index q = sorted::position();
  if (q < n) w.group_edge[q] = q == 0 || w.sorted_group[q] != w.sorted_group[q - 1];
}

// One block: standard deviation of all valid rewards, for `global_std`.
__global__ void batch_deviation(const GroupAdvantagesParams p, Workspace w) {
  double sum = 0.0;
  for (Index i = threadIdx.x; i < p.num_samples; i += kThreads) {
    if (w.valid[i]) sum += p.proxy[i];
  }
  const double count = w.counters[1] > 0 ? w.counters[1] : 1;
  const double mean = sorted::block_sum(sum) / count;
  double squares = 0.0;
  for (Index i = threadIdx.x; i < p.num_samples; i += kThreads) {
    if (w.valid[i]) squares += (p.proxy[i] - mean) * (p.proxy[i] - mean);
  }
  squares = sorted::block_sum(squares);
  if (threadIdx.x == 0) *w.deviation = sqrt(squares / count);
}

// One block per group at a time.
__global__ void write_groups(const GroupAdvantagesParams p, Workspace w) {
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
    count = sorted::block_sum(count);
    const double members = count > 0 ? count : 1;
    const double mean = sorted::block_sum(reward) / members;
    const double mean_distance = sorted::block_sum(distance) / members;
    double scale = 1.0;
    if (p.norm == AdvantageNorm::kGlobalStd) scale = *w.deviation + kStdEps;
    if (p.norm == AdvantageNorm::kGroupStd) {
      double squares = 0.0;
      for (Index q = begin + threadIdx.x; q < end; q += kThreads) {
        const Index i = w.by_group[q];
        if (w.valid[i]) squares += (p.proxy[i] - mean) * (p.proxy[i] - mean);
      }
      scale = sqrt(sorted::block_sum(squares) / members) + kStdEps;
    }
    for (Index q = begin + threadIdx.x; q < end; q += kThreads) {
      const Index i = w.by_group[q];
      p.advantage[i] = w.valid[i] ? advantage_of(p, i, mean, scale, mean_distance) : 0.0;
    }
  }
}

inline void by_sorting(const GroupAdvantagesCudaParams& params) {
  const GroupAdvantagesParams& p = params.common;
  const std::int64_t n = p.num_samples;
  if (n > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("num_samples: expected at most 2^31 - 1 on a GPU");
  }
  const auto stream = static_cast<cudaStream_t>(params.stream);
  sorted::Pieces pieces(params.workspace);
  const Workspace w = divide(pieces, n);
  const auto size = static_cast<Index>(n);
  const auto blocks = static_cast<unsigned int>((n + kThreads - 1) / kThreads);
  check(cudaMemsetAsync(w.counters, 0, 2 * sizeof(Index), stream));
  launch(prepare, blocks, kThreads, 0, stream, p, w);
  sorted::sort_pairs(w.cub, w.cub_bytes, w.group_key, w.sorted_group, w.iota, w.by_group, n,
                     stream);
  launch(find_edges, blocks, kThreads, 0, stream, size, w);
  std::size_t bytes = w.cub_bytes;
  check(cub::DeviceSelect::Flagged(w.cub, bytes, w.iota, w.group_edge, w.start, w.counters, n,
                                   stream));
  if (p.norm == AdvantageNorm::kGlobalStd) {
    launch(batch_deviation, 1, kThreads, 0, stream, p, w);
  }
  const auto group_blocks = static_cast<unsigned int>(n < kGroupBlocks ? n : kGroupBlocks);
  launch(write_groups, group_blocks, kThreads, 0, stream, p, w);
}

}  // namespace advantages

std::int64_t group_advantages_cuda_workspace(std::int64_t num_samples) {
  if (num_samples <= kOneLaunchSamples) return 0;
  sorted::Pieces pieces(nullptr);
  advantages::divide(pieces, num_samples);
  return pieces.used();
}

void group_advantages_cuda(const GroupAdvantagesCudaParams& params) {
  const GroupAdvantagesParams& p = params.common;
  if (params.workspace_size < group_advantages_cuda_workspace(p.num_samples)) {
    throw std::invalid_argument("workspace: too small");
  }
  if (p.num_samples == 0) return;
  if (p.num_samples > kOneLaunchSamples) return advantages::by_sorting(params);
  launch(advantages::sum_and_write, one_launch::blocks(p.num_samples), one_launch::kThreads, 0,
         static_cast<cudaStream_t>(params.stream), p);
}

}  // namespace gardo
