// Kernel launches, and errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// The block's shared memory whose size is given at launch. The tests, which run the kernels on a
// CPU, define their own.
#ifndef GARDO_DYNAMIC_SHARED
#define GARDO_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace gardo {

inline void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
  }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned int blocks, int threads,
            [[maybe_unused]] long long shared_bytes, [[maybe_unused]] cudaStream_t stream,
            Arguments... arguments) {
#ifdef GARDO_CUDA_EMULATION
  emulation::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
#else
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
#endif
  check(cudaGetLastError());
}

}  // namespace gardo
