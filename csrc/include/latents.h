// How the kernels on latents receive their tensors.
//
// A tensor of B rows is contiguous [B, row_size]: one row is one sample, whatever its shape was.
// Inputs may be float32, float16 or bfloat16, each on its own; arithmetic is in float32.
#pragma once

#include <cstdint>

namespace gardo {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct ConstLatents {
  const void* data;  // null: not given
  DType dtype;
};

struct Latents {
  void* data;  // null: not wanted
  DType dtype;
};

// One value for all rows (stride 0) or one per row (stride 1).
struct RowScalar {
  const float* data;
  std::int64_t stride;

  float operator[](std::int64_t row) const { return data[row * stride]; }
};

struct Extent {
  std::int64_t rows;
  std::int64_t row_size;
  int num_threads;
};

// The velocity of the policy: `cond`, or with guidance `uncond + guidance_scale * (cond - uncond)`.
struct Velocity {
  ConstLatents cond;
  ConstLatents uncond;  // null data: no guidance
  float guidance_scale;
};

}  // namespace gardo
