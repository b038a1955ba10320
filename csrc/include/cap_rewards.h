// The proxy reward capped at what the auxiliary rewards support, by a pool of the base policy.
#pragma once

#include <cmath>
#include <cstdint>

namespace gardo {

// All pointers are contiguous. N samples, K auxiliary rewards, a pool of M samples.
struct CapRewardsParams {
  const double* proxy;  // [N]
  const double* aux;    // [K, N]
  // [1 + K, M], each row ascending. What is infinite is left out: equally many of each row.
  const double* pool;
  std::int64_t num_samples;  // N
  std::int64_t num_aux;      // K, at least 1
  std::int64_t pool_size;    // M
  double tau;
  int num_threads;

  double* capped;  // out [N]: NaN for a sample with a value that is not finite
};

void cap_rewards_cpu(const CapRewardsParams& params);

// As GroupAdvantagesCudaParams, without a workspace: device memory, enqueued on `stream`,
// capturable.
struct CapRewardsCudaParams {
  CapRewardsParams common;   // its `tau` is used where `device_tau` is null
  const double* device_tau;  // [1], so that a captured graph can be replayed with another
  void* stream;
};

void cap_rewards_cuda(const CapRewardsCudaParams& params);

#ifdef __CUDACC__
#define GARDO_ON_BOTH __host__ __device__
#else
#define GARDO_ON_BOTH
#endif

namespace capping {

GARDO_ON_BOTH inline bool is_finite(double value) {
  return value - value == 0.0;
}

// How many of the ascending values[0, size) are below `value`, or, with `or_equal`, not above it.
GARDO_ON_BOTH inline std::int64_t count_below(const double* values, std::int64_t size, double value,
                                              bool or_equal) {
  std::int64_t begin = 0, end = size;
  while (begin < end) {
    const std::int64_t middle = begin + (end - begin) / 2;
    if (values[middle] < value || (or_equal && values[middle] == value)) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// The number of samples of the pool that are not left out.
GARDO_ON_BOTH inline std::int64_t valid_size(const CapRewardsParams& p) {
  return count_below(p.pool, p.pool_size, HUGE_VAL, false);
}

// The quantile by linear interpolation. Rises with the level, rounding included: hence the bound.
GARDO_ON_BOTH inline double quantile(const double* values, std::int64_t size, double level) {
  const double position = (level > 0.0 ? level : 0.0) * static_cast<double>(size - 1);
  const auto lower = static_cast<std::int64_t>(position);
  const double low = values[lower];
  const double high = values[lower + 1 < size ? lower + 1 : lower];
  const double between = low + (high - low) * (position - static_cast<double>(lower));
  return between < high ? between : high;
}

// What the proxy of sample i is capped to, by a pool of `size` valid samples.
GARDO_ON_BOTH inline double capped(const CapRewardsParams& p, std::int64_t size, double tau,
                                   std::int64_t i) {
  const double proxy = p.proxy[i];
  bool known = is_finite(proxy) && size > 0;
  std::int64_t wins = 0;  // doubled, so that ties are exact integers
  for (std::int64_t k = 0; known && k < p.num_aux; ++k) {
    const double own = p.aux[k * p.num_samples + i];
    const double* others = p.pool + (k + 1) * p.pool_size;
    known = is_finite(own);
    wins += count_below(others, size, own, false) + count_below(others, size, own, true);
  }
  const double level = static_cast<double>(wins) / static_cast<double>(2 * p.num_aux * size) + tau;
  if (!known || level != level) return NAN;
  if (level >= 1.0) return proxy;
  const double cap = quantile(p.pool, size, level);
  return proxy < cap ? proxy : cap;
}

}  // namespace capping
}  // namespace gardo
