// Stable sorts with the signatures of CUB; the temporary memory is asked for and then left alone.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace cub {

struct DeviceRadixSort {
  template <typename Key, typename Value>
  static cudaError_t SortPairs(void* temporary, std::size_t& bytes, const Key* keys_in,
                               Key* keys_out, const Value* values_in, Value* values_out,
                               std::int64_t n, int = 0, int = 64, cudaStream_t = nullptr) {
    if (temporary == nullptr) {
      bytes = 64;
      return cudaSuccess;
    }
    std::vector<std::int64_t> order(n);
    std::iota(order.begin(), order.end(), std::int64_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int64_t a, std::int64_t b) { return keys_in[a] < keys_in[b]; });
    for (std::int64_t i = 0; i < n; ++i) {
      keys_out[i] = keys_in[order[i]];
      values_out[i] = values_in[order[i]];
    }
    return cudaSuccess;
  }

  template <typename Key>
  static cudaError_t SortKeys(void* temporary, std::size_t& bytes, const Key* in, Key* out,
                              std::int64_t n, int = 0, int = 64, cudaStream_t = nullptr) {
    if (temporary == nullptr) {
      bytes = 64;
      return cudaSuccess;
    }
    std::copy(in, in + n, out);
    std::sort(out, out + n);
    return cudaSuccess;
  }
};

}  // namespace cub
