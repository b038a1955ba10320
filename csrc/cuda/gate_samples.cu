#include "gate_samples.h"

#include <cuda_runtime.h>

#include <cmath>
#include <limits>
#include <stdexcept>

#include "gate_samples_kernel.cuh"
#include "launch.cuh"
#include "sorting.cuh"

namespace gardo {
namespace gating {

__global__ void __launch_bounds__(gardo::one_launch::kThreads)
    count_and_gate(const GateSamplesParams p, const double* device_fraction, bool group_thresholds,
                   bool zero_mean, int padded, unsigned int* finished) {
  GARDO_DYNAMIC_SHARED(double, shared);
  __shared__ bool last;
  one_launch::count_block(p, group_thresholds, shared);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(finished, 1u) + 1 == gridDim.x;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const double fraction = device_fraction == nullptr ? p.fraction : *device_fraction;
  if (group_thresholds) {
    one_launch::gate_groups(p, zero_mean, fraction, shared, padded);
  } else {
    one_launch::gate_batch(p, zero_mean, fraction, shared, padded);
  }
}

inline void in_one_launch(const GateSamplesCudaParams& params) {
  GateSamplesParams p = params.common;
  if (p.num_samples == 0) p.num_aux = 0;  // shared memory is for few auxiliaries
  const auto stream = static_cast<cudaStream_t>(params.stream);
  auto* finished = static_cast<unsigned int*>(params.workspace);
  int padded = 1;
  while (padded < p.num_samples) padded *= 2;
  const unsigned int blocks = gardo::one_launch::blocks(p.num_samples);
  check(cudaMemsetAsync(finished, 0, sizeof(*finished), stream));
  // One block also runs without samples, for the threshold and the mean.
  launch(count_and_gate, blocks == 0 ? 1 : blocks, gardo::one_launch::kThreads,
         one_launch::shared_bytes(p.num_aux, padded), stream, p, params.device_fraction,
         has_group_thresholds(p), has_zero_mean(p), padded, finished);
}

// ---- many samples: ranks by stable radix sorts (CUB), O(K N log N)
// -------------------------------
//
// All sizes that depend on the data stay on the device, so nothing waits for the host. Every sum is
// over a fixed order, and integers carry the ranks, so results are reproducible.

using sorted::Index;
using sorted::Key;
using sorted::kMissing;
using sorted::kThreads;

struct Workspace {
  Key* group_key;       // [N] by sample
  Key* sorted_group;    // [N] ascending
  Key* key_in;          // [N]
  Key* key_out;         // [N]
  Key* key_regroup;     // [N]
  long long* gap;       // [N] by sample
  Index* iota;          // [N] 0, 1, ...
  Index* order;         // [N]
  Index* regroup;       // [N]
  Index* in_scope;      // [N] valid samples of the scope of each sample
  std::uint8_t* valid;  // [N]
  void* cub;
  std::size_t cub_bytes;
};

inline Workspace divide(sorted::Pieces& pieces, std::int64_t n) {
  Workspace w;
  w.group_key = pieces.take<Key>(n);
  w.sorted_group = pieces.take<Key>(n);
  w.key_in = pieces.take<Key>(n);
  w.key_out = pieces.take<Key>(n);
  w.key_regroup = pieces.take<Key>(n);
  w.gap = pieces.take<long long>(n);
  w.iota = pieces.take<Index>(n);
  w.order = pieces.take<Index>(n);
  w.regroup = pieces.take<Index>(n);
  w.in_scope = pieces.take<Index>(n);
  w.valid = pieces.take<std::uint8_t>(n);
  w.cub_bytes = sorted::cub_bytes(n);
  w.cub = pieces.take<char>(static_cast<std::int64_t>(w.cub_bytes));
  return w;
}

inline std::int64_t workspace_bytes(std::int64_t n) {
  sorted::Pieces pieces(nullptr);
  divide(pieces, n);
  return pieces.used();
}

__global__ void prepare(const GateSamplesParams p, Workspace w) {
  const Index i = sorted::position();
  if (i >= p.num_samples) return;
  w.valid[i] = takes_part(p, i);
  w.group_key[i] = sorted::group_key(p.groups[i]);
  w.iota[i] = i;
  w.gap[i] = 0;
}

__global__ void reward_keys(const GateSamplesParams p, Workspace w, std::int64_t k) {
  const Index i = sorted::position();
  if (i >= p.num_samples) return;
  w.key_in[i] = kMissing;
  if (!w.valid[i]) return;
  const Key key = sorted::key_of(reward_of(p, k, i));
  w.key_in[i] = p.side == Side::kUnder ? ~key : key;
}

// Where the scope of sample i lies in the order by scope.
__device__ inline Index scope_of(const Workspace& w, Index i, Index n, bool grouped, Index* end) {
  *end = n;
  if (!grouped) return 0;
  const Index begin = sorted::lower_bound(w.sorted_group, 0, n, w.group_key[i]);
  *end = sorted::upper_bound(w.sorted_group, begin, n, w.group_key[i]);
  return begin;
}

// Adds the score of reward k to the gap of each sample. Without groups the sorted keys are key_out
// and `order`; with groups position q of the regrouped order is position regroup[q] of those.
__global__ void add_scores(const GateSamplesParams p, Workspace w, std::int64_t k, bool grouped) {
  const Index q = sorted::position();
  const auto n = static_cast<Index>(p.num_samples);
  if (q >= n) return;
  const Key* keys = grouped ? w.key_in : w.key_out;
  const Index i = grouped ? w.order[w.regroup[q]] : w.order[q];
  if (!w.valid[i]) return;
  Index end;
  const Index begin = scope_of(w, i, n, grouped, &end);
  long long score = q - begin + 1;
  if (p.ties != Ties::kOrdinal) {
    const Index tie_begin = sorted::lower_bound(keys, begin, end, keys[q]);
    const Index tie_end = sorted::upper_bound(keys, tie_begin, end, keys[q]);
    score = 2LL * (tie_begin - begin);
    if (p.ties == Ties::kHalf) score += tie_end - tie_begin - 1;
  }
  w.gap[i] += (k == 0 ? p.num_aux : -1) * score;
  if (k == 0) w.in_scope[i] = sorted::lower_bound(keys, begin, end, kMissing) - begin;
}

// Uncertainty of each sample, and the key of one that the fraction is a share of.
__global__ void uncertainties(const GateSamplesParams p, Workspace w) {
  const Index i = sorted::position();
  if (i >= p.num_samples) return;
  double u = 0.0;
  if (w.valid[i] && p.num_aux > 0) u = static_cast<double>(w.gap[i]) / unit_of(p, w.in_scope[i]);
  p.uncertainty[i] = u;
  const bool counts = w.valid[i] && (p.share_of == ShareOf::kAll || u >= 0.0);
  w.key_in[i] = counts ? sorted::key_of(u) : kMissing;
}

// The (1 - fraction) quantile of the keys [begin, begin + count).
__device__ inline double quantile(const GateSamplesParams& p, const double* device_fraction,
                                  const Key* keys, Index begin, Index count) {
  if (count == 0) return 0.0;
  const double fraction = device_fraction == nullptr ? p.fraction : *device_fraction;
  const double at = (1.0 - fraction) * static_cast<double>(count - 1);
  const auto lower = static_cast<Index>(at);
  const Index upper = lower + 1 < count ? lower + 1 : lower;
  return interpolated(sorted::value_of(keys[begin + lower]), sorted::value_of(keys[begin + upper]),
                      at - static_cast<double>(lower));
}

// One block: threshold and mean of the sorted uncertainties.
__global__ void find_threshold(const GateSamplesParams p, Workspace w,
                               const double* device_fraction, bool zero_mean) {
  const auto n = static_cast<Index>(p.num_samples);
  const Index count = sorted::lower_bound(w.key_out, 0, n, kMissing);
  const bool all = p.share_of == ShareOf::kAll;
  double sum = 0.0;
  if (all && p.num_aux > 0) {
    long long gaps = 0;
    for (Index i = threadIdx.x; i < n; i += kThreads) gaps += w.gap[i];
    sum = static_cast<double>(sorted::block_sum(gaps)) / unit_of(p, count);
  } else {
    for (Index q = threadIdx.x; q < count; q += kThreads) sum += sorted::value_of(w.key_out[q]);
    sum = sorted::block_sum(sum);
  }
  if (threadIdx.x != 0) return;
  *p.mean_uncertainty = zero_mean || count == 0 ? 0.0 : sum / static_cast<double>(count);
  *p.threshold = quantile(p, device_fraction, w.key_out, 0, count);
}

__global__ void write_gate(const GateSamplesParams p, Workspace w) {
  const Index i = sorted::position();
  if (i < p.num_samples) p.gate[i] = w.valid[i] && p.uncertainty[i] > *p.threshold;
}

// Threshold and gate by group, from the keys of the uncertainties in the order by group.
__global__ void write_group_gates(const GateSamplesParams p, Workspace w,
                                  const double* device_fraction) {
  const Index i = sorted::position();
  const auto n = static_cast<Index>(p.num_samples);
  if (i == 0) *p.mean_uncertainty = 0.0;
  if (i >= n) return;
  double threshold = 0.0;
  if (w.valid[i]) {
    Index end;
    const Index begin = scope_of(w, i, n, true, &end);
    const Index count = sorted::lower_bound(w.key_in, begin, end, kMissing) - begin;
    threshold = quantile(p, device_fraction, w.key_in, begin, count);
  }
  p.threshold[i] = threshold;
  p.gate[i] = w.valid[i] && p.uncertainty[i] > threshold;
}

// Adds the gaps of each group into key_regroup, where the group begins in the order by group.
__global__ void add_group_gaps(const GateSamplesParams p, Workspace w) {
  const Index i = sorted::position();
  if (i >= p.num_samples || !w.valid[i]) return;
  Index end;
  const Index begin = scope_of(w, i, static_cast<Index>(p.num_samples), true, &end);
  atomicAdd(reinterpret_cast<unsigned long long*>(w.key_regroup + begin),
            static_cast<unsigned long long>(w.gap[i]));
}

// One block: mean U from the gaps of the groups. A group begins with its valid samples.
__global__ void find_group_mean(const GateSamplesParams p, Workspace w) {
  double sum = 0.0;
  Index count = 0;
  for (Index q = threadIdx.x; q < p.num_samples; q += kThreads) {
    count += w.valid[q];
    const auto gaps = static_cast<long long>(w.key_regroup[q]);
    if (gaps != 0) sum += static_cast<double>(gaps) / unit_of(p, w.in_scope[w.order[w.regroup[q]]]);
  }
  count = sorted::block_sum(count);
  sum = sorted::block_sum(sum);
  if (threadIdx.x == 0) *p.mean_uncertainty = count == 0 ? 0.0 : sum / static_cast<double>(count);
}

inline void by_sorting(const GateSamplesCudaParams& params) {
  const GateSamplesParams& p = params.common;
  const std::int64_t n = p.num_samples;
  if (n > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("num_samples: expected at most 2^31 - 1 on a GPU");
  }
  const auto stream = static_cast<cudaStream_t>(params.stream);
  sorted::Pieces pieces(params.workspace);
  const Workspace w = divide(pieces, n);
  const auto size = static_cast<Index>(n);
  const auto blocks = static_cast<unsigned int>((n + kThreads - 1) / kThreads);
  const auto sort = [&](const Key* in, Key* out, Index* order) {
    sorted::sort_pairs(w.cub, w.cub_bytes, in, out, w.iota, order, n, stream);
  };
  const bool grouped = p.scope == RankScope::kGroup;
  // Sorts key_in by value into key_out, and with groups then by group into key_in.
  const auto sort_keys = [&] {
    sort(w.key_in, w.key_out, w.order);
    if (!grouped) return;
    launch(sorted::gather, blocks, kThreads, 0, stream, size, w.group_key, w.order, w.key_regroup);
    // The sorted group keys are known already; key_in is free to receive them again.
    sort(w.key_regroup, w.key_in, w.regroup);
    launch(sorted::gather, blocks, kThreads, 0, stream, size, w.key_out, w.regroup, w.key_in);
  };

  launch(prepare, blocks, kThreads, 0, stream, p, w);
  if (grouped) sort(w.group_key, w.sorted_group, w.order);
  for (std::int64_t k = 0; p.num_aux > 0 && k <= p.num_aux; ++k) {
    launch(reward_keys, blocks, kThreads, 0, stream, p, w, k);
    sort_keys();
    launch(add_scores, blocks, kThreads, 0, stream, p, w, k, grouped);
  }
  launch(uncertainties, blocks, kThreads, 0, stream, p, w);
  if (has_group_thresholds(p)) {
    sort_keys();
    launch(write_group_gates, blocks, kThreads, 0, stream, p, w, params.device_fraction);
    if (has_zero_mean(p)) return;
    // The keys by group have been read.
    check(cudaMemsetAsync(w.key_regroup, 0, n * sizeof(Key), stream));
    launch(add_group_gaps, blocks, kThreads, 0, stream, p, w);
    launch(find_group_mean, 1, kThreads, 0, stream, p, w);
    return;
  }
  std::size_t bytes = w.cub_bytes;
  check(cub::DeviceRadixSort::SortKeys(w.cub, bytes, w.key_in, w.key_out, n, 0, 64, stream));
  launch(find_threshold, 1, kThreads, 0, stream, p, w, params.device_fraction, has_zero_mean(p));
  launch(write_gate, blocks, kThreads, 0, stream, p, w);
}

inline bool fits_one_launch(std::int64_t num_samples, std::int64_t num_aux) {
  return num_samples == 0 || (num_samples <= kOneLaunchSamples && num_aux <= kOneLaunchAux);
}

}  // namespace gating

std::int64_t gate_samples_cuda_workspace(std::int64_t num_samples, std::int64_t num_aux) {
  if (gating::fits_one_launch(num_samples, num_aux)) return 256;
  return gating::workspace_bytes(num_samples);
}

void gate_samples_cuda(const GateSamplesCudaParams& params) {
  const GateSamplesParams& p = params.common;
  if (params.workspace_size < gate_samples_cuda_workspace(p.num_samples, p.num_aux)) {
    throw std::invalid_argument("workspace: too small");
  }
  if (gating::fits_one_launch(p.num_samples, p.num_aux)) {
    gating::in_one_launch(params);
  } else {
    gating::by_sorting(params);
  }
}

}  // namespace gardo
