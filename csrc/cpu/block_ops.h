// Blocks of one row, in and out of memory.
//
// A kernel cuts each row into blocks of kBlock elements and works on them in float32, with one loop
// over all tensors (lanes.h). Sums go over a fixed number of lanes and then over blocks in order,
// so a row's result depends on nothing but the row, on any instruction set and with any number of
// threads.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "bfloat.h"
#include "latents.h"

namespace gardo {

constexpr std::int64_t kBlock = 1024;  // a multiple of 4, which the noise relies on

// The block as float32: a pointer into the tensor itself where it is float32, else into `scratch`.
const float* load_block(ConstLatents tensor, std::int64_t offset, std::int64_t n, float* scratch);
// Where to write a block that store_block then stores: the tensor itself where it is float32.
float* block_target(Latents tensor, std::int64_t offset, float* scratch);
void store_block(const float* values, Latents tensor, std::int64_t offset, std::int64_t n);

// f(BFloat16{}) if all of these tensors are bfloat16, as models give velocities: then the loops
// convert them in registers. Else f(float{}): blocks are converted before and after.
template <typename F>
void with_velocity_type(std::initializer_list<ConstLatents> tensors, F f) {
  bool bfloat = true;
  for (const ConstLatents& t : tensors) {
    bfloat = bfloat && (t.data == nullptr || t.dtype == DType::kBFloat16);
  }
  if (bfloat) {
    f(BFloat16{});
  } else {
    f(float{});
  }
}

// The three functions above for either type of velocities.
template <typename V>
const V* load_velocity(ConstLatents tensor, std::int64_t offset, std::int64_t n, float* scratch) {
  if constexpr (std::is_same_v<V, float>) return load_block(tensor, offset, n, scratch);
  return static_cast<const V*>(tensor.data) + offset;
}
template <typename V>
V* velocity_target(Latents tensor, std::int64_t offset, float* scratch) {
  if constexpr (std::is_same_v<V, float>) return block_target(tensor, offset, scratch);
  return static_cast<V*>(tensor.data) + offset;
}
template <typename V>
void store_velocity(const V* values, Latents tensor, std::int64_t offset, std::int64_t n) {
  if constexpr (std::is_same_v<V, float>) store_block(values, tensor, offset, n);
}

double sum_squares(const float* x, std::int64_t n);
// Sum of (a*p - b*q)^2
double sum_squared_scaled_difference(float a, const float* p, float b, const float* q,
                                     std::int64_t n);

}  // namespace gardo
