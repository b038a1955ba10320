// Blocks of one row, in and out of memory.
//
// A kernel cuts each row into blocks of kBlock elements and works on them in float32, with one loop
// over all tensors (lanes.h). Sums go over a fixed number of lanes and then over blocks in order,
// so a row's result depends on nothing but the row, on any instruction set and with any number of
// threads.
#pragma once

#include <cstdint>

#include "latents.h"

namespace gardo {

constexpr std::int64_t kBlock = 1024;  // a multiple of 4, which the noise relies on

// The block as float32: a pointer into the tensor itself where it is float32, else into `scratch`.
const float* load_block(ConstLatents tensor, std::int64_t offset, std::int64_t n, float* scratch);
// Where to write a block that store_block then stores: the tensor itself where it is float32.
float* block_target(Latents tensor, std::int64_t offset, float* scratch);
void store_block(const float* values, Latents tensor, std::int64_t offset, std::int64_t n);

double sum_squares(const float* x, std::int64_t n);
// Sum of (a*p - b*q)^2
double sum_squared_scaled_difference(float a, const float* p, float b, const float* q,
                                     std::int64_t n);

}  // namespace gardo
