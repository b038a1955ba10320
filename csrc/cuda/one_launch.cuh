// What the kernels share that count all pairs in one launch, for up to kOneLaunchSamples samples.
//
// Counting all pairs takes N^2 comparisons, which a GPU does faster than it sorts a few thousand
// numbers; every block counts for its own samples. No atomics on floating point: results are
// reproducible.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gardo {
namespace one_launch {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr int kPerWarp = 4;                   // samples that a warp counts for at a time
constexpr int kPerBlock = kWarps * kPerWarp;  // samples of a block
constexpr int kTile = 128;                    // samples compared with, held in shared memory

template <typename T>
__device__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

inline unsigned int blocks(std::int64_t num_samples) {
  return static_cast<unsigned int>((num_samples + kPerBlock - 1) / kPerBlock);
}

}  // namespace one_launch
}  // namespace gardo
