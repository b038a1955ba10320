// Stable sorting of samples by 64-bit keys (CUB), and searching in what was sorted.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_select.cuh>

#include "launch.cuh"

namespace gardo {
namespace sorted {

using Index = std::uint32_t;
using Key = std::uint64_t;

constexpr Key kMissing = ~Key{0};  // after the key of every finite number
constexpr int kThreads = 256;

// Hands out aligned pieces of the caller's memory; with a null base it only adds up the sizes.
class Pieces {
 public:
  explicit Pieces(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(std::int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<std::int64_t>(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }

  std::int64_t used() const { return used_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

inline std::size_t cub_bytes(std::int64_t n) {
  std::size_t pairs = 0, keys = 0, select = 0;
  check(cub::DeviceRadixSort::SortPairs(
      nullptr, pairs, static_cast<const Key*>(nullptr), static_cast<Key*>(nullptr),
      static_cast<const Index*>(nullptr), static_cast<Index*>(nullptr), n));
  check(cub::DeviceRadixSort::SortKeys(nullptr, keys, static_cast<const Key*>(nullptr),
                                       static_cast<Key*>(nullptr), n));
  check(cub::DeviceSelect::Flagged(nullptr, select, static_cast<const Index*>(nullptr),
                                   static_cast<const std::uint8_t*>(nullptr),
                                   static_cast<Index*>(nullptr), static_cast<Index*>(nullptr), n));
  return pairs > keys ? (pairs > select ? pairs : select) : (keys > select ? keys : select);
}

inline void sort_pairs(void* cub, std::size_t bytes, const Key* keys_in, Key* keys_out,
                       const Index* in, Index* out, std::int64_t n, cudaStream_t stream) {
  check(cub::DeviceRadixSort::SortPairs(cub, bytes, keys_in, keys_out, in, out, n, 0, 64, stream));
}

__host__ __device__ inline Key group_key(std::int64_t group) {
  return static_cast<Key>(group) ^ (Key{1} << 63);
}

__device__ inline Key key_of(double value) {
  const Key raw = static_cast<Key>(__double_as_longlong(value + 0.0));  // -0 becomes 0
  return raw >> 63 != 0 ? ~raw : raw | (Key{1} << 63);
}

// First position in the ascending keys[begin, end) whose key is not below (above) `key`.
__device__ inline Index lower_bound(const Key* keys, Index begin, Index end, Key key) {
  while (begin < end) {
    const Index middle = begin + (end - begin) / 2;
    if (keys[middle] < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

__device__ inline Index upper_bound(const Key* keys, Index begin, Index end, Key key) {
  while (begin < end) {
    const Index middle = begin + (end - begin) / 2;
    if (keys[middle] <= key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

__device__ inline Index position() {
  return blockIdx.x * kThreads + threadIdx.x;
}

__device__ inline double value_of(Key key) {
  const Key raw = key >> 63 != 0 ? key ^ (Key{1} << 63) : ~key;
  return __longlong_as_double(static_cast<long long>(raw));
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

// to[q] = from[at[q]]
static __global__ void gather(Index n, const Key* from, const Index* at, Key* to) {
  const Index q = position();
  if (q < n) to[q] = from[at[q]];
}

}  // namespace sorted
}  // namespace gardo
