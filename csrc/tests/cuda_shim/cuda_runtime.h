// Enough of CUDA to run this project's kernels on a CPU: not for speed, but to test their logic
// where there is no GPU. Blocks run one after the other. The threads of a block are fibers that
// take turns; each runs up to its next barrier or shuffle, so the kernels must reach those the same
// number of times in all threads of a block (which CUDA asks of __syncthreads anyway).
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define GARDO_CUDA_EMULATION
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(threads)
#define GARDO_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulation::shared())

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) {
  return "emulated";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

struct Dim {
  unsigned int x;
};
inline Dim threadIdx, blockIdx, gridDim;

namespace emulation {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<double> dynamic_shared;
  std::vector<std::uint64_t> lanes;  // what each thread offers in a shuffle
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler;
  unsigned int current = 0;
};

inline Block& block() {
  static Block instance;
  return instance;
}

inline void* shared() {
  return block().dynamic_shared.data();
}

// Lets the other threads run up to the same point.
inline void yield() {
  Block& b = block();
  const unsigned int self = b.current;
  swapcontext(&b.fibers[self]->context, &b.scheduler);
}

inline void enter() {
  Block& b = block();
  (*b.body)();
  b.fibers[b.current]->done = true;
  swapcontext(&b.fibers[b.current]->context, &b.scheduler);
}

inline void run(unsigned int blocks, int threads, long long shared_bytes,
                const std::function<void()>& body) {
  constexpr std::size_t kStack = 256 * 1024;
  Block& b = block();
  b.body = &body;
  b.lanes.assign(threads, 0);
  while (static_cast<int>(b.fibers.size()) < threads) {
    b.fibers.push_back(std::make_unique<Fiber>());
    b.fibers.back()->stack.resize(kStack);
  }
  gridDim.x = blocks;
  for (unsigned int index = 0; index < blocks; ++index) {
    blockIdx.x = index;
    // NaN: a kernel that reads what it never wrote gives itself away.
    b.dynamic_shared.assign((shared_bytes + 7) / 8, std::nan(""));
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = *b.fibers[thread];
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &enter, 0);
    }
    for (int running = threads; running > 0;) {
      int waiting = 0;
      for (int thread = 0; thread < threads; ++thread) {
        Fiber& fiber = *b.fibers[thread];
        if (fiber.done) continue;
        b.current = threadIdx.x = thread;
        swapcontext(&b.scheduler, &fiber.context);
        if (!fiber.done) ++waiting;
      }
      if (waiting != 0 && waiting != threads) {
        throw std::logic_error("some threads of a block left before a barrier of the others");
      }
      running = waiting;
    }
  }
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::yield();
}
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned int, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  auto& lanes = emulation::block().lanes;
  const unsigned int self = threadIdx.x;
  std::memcpy(&lanes[self], &value, sizeof(T));
  emulation::yield();
  T other;
  std::memcpy(&other, &lanes[self ^ static_cast<unsigned int>(lane_mask)], sizeof(T));
  emulation::yield();
  return other;
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}

inline long long __double_as_longlong(double value) {
  long long raw;
  std::memcpy(&raw, &value, sizeof(raw));
  return raw;
}

inline double __longlong_as_double(long long raw) {
  double value;
  std::memcpy(&value, &raw, sizeof(value));
  return value;
}

using std::isfinite;
using std::sqrt;
