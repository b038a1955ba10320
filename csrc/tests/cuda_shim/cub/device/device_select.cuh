// Selection with the signature of CUB.
#pragma once

#include <cuda_runtime.h>

namespace cub {

struct DeviceSelect {
  template <typename T, typename Flag, typename Count>
  static cudaError_t Flagged(void* temporary, std::size_t& bytes, const T* in, const Flag* flags,
                             T* out, Count* count, std::int64_t n, cudaStream_t = nullptr) {
    if (temporary == nullptr) {
      bytes = 64;
      return cudaSuccess;
    }
    *count = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      if (flags[i]) out[(*count)++] = in[i];
    }
    return cudaSuccess;
  }
};

}  // namespace cub
