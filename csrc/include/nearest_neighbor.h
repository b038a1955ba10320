// Cosine distance of each sample to its nearest other member of its group.
#pragma once

#include "latents.h"

namespace gardo {

struct NearestNeighborParams {
  ConstLatents features;       // [N, D]
  const std::int64_t* groups;  // [N], any values in any order
  std::int64_t num_samples;    // N
  std::int64_t dim;            // D
  int num_threads;

  float* distance;  // out [N] in [0, 2]; 0 without another usable member; NaN for a non-finite row
};

// Identical rows are at distance exactly 0. Workspace: the features of num_threads groups.
void nearest_neighbor_cpu(const NearestNeighborParams& params);

// Number of members of the largest group; 0 without samples.
std::int64_t largest_group(const std::int64_t* group_ids, std::int64_t num_samples);

}  // namespace gardo
