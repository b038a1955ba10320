// Vectorised primitives on blocks of one row, shared by all kernels on latents.
//
// A kernel cuts each row into blocks of kBlock elements and composes these primitives on float32
// blocks that stay in the first-level cache. Because every kernel calls the same compiled
// functions, equal inputs give equal bits in all of them: the on-policy ratio is exactly 1. Sums go
// over a fixed number of lanes and then over blocks in order, so a row's result depends on nothing
// but the row, on any instruction set and with any number of threads.
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

// out = uncond + scale * (cond - uncond)
void guide(const float* cond, const float* uncond, float scale, std::int64_t n, float* out);
// out = a*x + b*y
void affine(float a, const float* x, float b, const float* y, std::int64_t n, float* out);
// out = x + c*y
void add_scaled(const float* x, float c, const float* y, std::int64_t n, float* out);
// out = a * (p - q)
void scaled_difference(float a, const float* p, const float* q, std::int64_t n, float* out);
// out += a * (p - q)
void add_scaled_difference(float a, const float* p, const float* q, std::int64_t n, float* out);
// out = a * x
void scale(float a, const float* x, std::int64_t n, float* out);
// out = (xt - t*v) - x0
void denoising_error(const float* xt, float t, const float* v, const float* x0, std::int64_t n,
                     float* out);

double sum_squared_difference(const float* p, const float* q, std::int64_t n);
// Sum of (a*p - b*q)^2
double sum_squared_scaled_difference(float a, const float* p, float b, const float* q,
                                     std::int64_t n);
double sum_squares(const float* x, std::int64_t n);
double sum_abs(const float* x, std::int64_t n);

}  // namespace gardo
