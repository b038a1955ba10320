#include "win_rate.h"

#include <cuda_runtime.h>

#include <limits>
#include <stdexcept>

#include "launch.cuh"
#include "sorting.cuh"

namespace gardo {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;

__device__ bool is_missing(double reward) {
  return reward != reward;
}

__device__ double rate_of(long long doubled_wins, long long rivals) {
  return rivals > 0 ? static_cast<double>(doubled_wins) / static_cast<double>(2 * rivals) : 0.5;
}

// One warp per sample and reward compares it with all others.
__global__ void __launch_bounds__(kWarp* kWarps) count_wins(const WinRateParams p) {
  const long long n = p.num_samples;
  const long long first = (static_cast<long long>(blockIdx.x) * kWarps) + threadIdx.x / kWarp;
  const bool inside = first < p.num_rewards * n;
  const double* rewards = p.rewards + (inside ? first / n * n : 0);
  const long long i = inside ? first % n : 0;
  const double own = rewards[i];
  long long wins = 0, rivals = 0;
  for (long long j = threadIdx.x % kWarp; inside && j < n; j += kWarp) {
    const double other = rewards[j];
    if (j == i || is_missing(other)) continue;
    if (p.groups != nullptr && p.groups[j] != p.groups[i]) continue;
    ++rivals;
    wins += other < own ? 2 : (other == own ? 1 : 0);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    wins += __shfl_xor_sync(0xffffffffu, wins, step);
    rivals += __shfl_xor_sync(0xffffffffu, rivals, step);
  }
  if (inside && threadIdx.x % kWarp == 0) {
    p.rate[first] = is_missing(own) ? own : rate_of(wins, rivals);
  }
}

using sorted::Index;
using sorted::Key;

struct Workspace {
  Key *group_key, *sorted_group, *key_in, *key_out, *key_regroup;  // [N] each
  Index *iota, *order, *regroup;                                   // [N] each
  void* cub;
  std::size_t cub_bytes;
};

Workspace divide(sorted::Pieces& pieces, std::int64_t n) {
  Workspace w;
  for (Key** keys : {&w.group_key, &w.sorted_group, &w.key_in, &w.key_out, &w.key_regroup}) {
    *keys = pieces.take<Key>(n);
  }
  for (Index** indices : {&w.iota, &w.order, &w.regroup}) *indices = pieces.take<Index>(n);
  w.cub_bytes = sorted::cub_bytes(n);
  w.cub = pieces.take<char>(static_cast<std::int64_t>(w.cub_bytes));
  return w;
}

__global__ void prepare(const WinRateParams p, Workspace w) {
  const Index i = sorted::position();
  if (i >= p.num_samples) return;
  w.iota[i] = i;
  w.group_key[i] = p.groups == nullptr ? 0 : sorted::group_key(p.groups[i]);
}

__global__ void reward_keys(const WinRateParams p, Workspace w, const double* rewards) {
  const Index i = sorted::position();
  if (i >= p.num_samples) return;
  w.key_in[i] = is_missing(rewards[i]) ? sorted::kMissing : sorted::key_of(rewards[i]);
}

// Position q of the samples ordered by group, then by reward.
__global__ void write_rates(const WinRateParams p, Workspace w, const double* rewards,
                            double* rate) {
  const Index q = sorted::position();
  const auto n = static_cast<Index>(p.num_samples);
  if (q >= n) return;
  const bool grouped = p.groups != nullptr;
  const Key* keys = grouped ? w.key_in : w.key_out;
  const Index i = grouped ? w.order[w.regroup[q]] : w.order[q];
  if (is_missing(rewards[i])) {
    rate[i] = rewards[i];
    return;
  }
  Index begin = 0, end = n;
  if (grouped) {
    begin = sorted::lower_bound(w.sorted_group, 0, n, w.group_key[i]);
    end = sorted::upper_bound(w.sorted_group, begin, n, w.group_key[i]);
  }
  const Index rivals = sorted::lower_bound(keys, begin, end, sorted::kMissing) - begin - 1;
  const Index tie_begin = sorted::lower_bound(keys, begin, end, keys[q]);
  const Index tie_end = sorted::upper_bound(keys, tie_begin, end, keys[q]);
  rate[i] = rate_of(2LL * (tie_begin - begin) + (tie_end - tie_begin) - 1, rivals);
}

void rank_by_sorting(const WinRateCudaParams& params, cudaStream_t stream) {
  const WinRateParams& p = params.common;
  const std::int64_t n = p.num_samples;
  if (n > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("num_samples: expected at most 2^31 - 1 on a GPU");
  }
  sorted::Pieces pieces(params.workspace);
  const Workspace w = divide(pieces, n);
  constexpr int kThreads = sorted::kThreads;
  const auto blocks = static_cast<unsigned int>((n + kThreads - 1) / kThreads);
  const auto size = static_cast<Index>(n);
  const auto sort = [&](const Key* in, Key* out, Index* order) {
    sorted::sort_pairs(w.cub, w.cub_bytes, in, out, w.iota, order, n, stream);
  };
  launch(prepare, blocks, kThreads, 0, stream, p, w);
  if (p.groups != nullptr) sort(w.group_key, w.sorted_group, w.order);
  for (std::int64_t k = 0; k < p.num_rewards; ++k) {
    const double* rewards = p.rewards + k * n;
    launch(reward_keys, blocks, kThreads, 0, stream, p, w, rewards);
    sort(w.key_in, w.key_out, w.order);
    if (p.groups != nullptr) {
      launch(sorted::gather, blocks, kThreads, 0, stream, size, w.group_key, w.order,
             w.key_regroup);
      // The sorted group keys are known already; key_in is free to receive them again.
      sort(w.key_regroup, w.key_in, w.regroup);
      launch(sorted::gather, blocks, kThreads, 0, stream, size, w.key_out, w.regroup, w.key_in);
    }
    launch(write_rates, blocks, kThreads, 0, stream, p, w, rewards, p.rate + k * n);
  }
}

}  // namespace

std::int64_t win_rate_cuda_workspace(std::int64_t num_samples) {
  if (num_samples <= kOneLaunchSamples) return 0;
  sorted::Pieces pieces(nullptr);
  divide(pieces, num_samples);
  return pieces.used();
}

void win_rate_cuda(const WinRateCudaParams& params) {
  const WinRateParams& p = params.common;
  if (params.workspace_size < win_rate_cuda_workspace(p.num_samples)) {
    throw std::invalid_argument("workspace: too small");
  }
  const auto stream = static_cast<cudaStream_t>(params.stream);
  const std::int64_t rates = p.num_rewards * p.num_samples;
  if (rates == 0) return;
  if (p.num_samples > kOneLaunchSamples) {
    rank_by_sorting(params, stream);
    return;
  }
  const std::int64_t blocks = (rates + kWarps - 1) / kWarps;
  if (blocks > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("num_rewards: too many for one launch");
  }
  launch(count_wins, static_cast<unsigned int>(blocks), kWarp * kWarps, 0, stream, p);
}

}  // namespace gardo
