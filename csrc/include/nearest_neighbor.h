// Cosine distance of each sample to its nearest other member of its group.
#pragma once

#include "latents.h"

namespace gardo {

struct NearestNeighborParams {
  ConstLatents features;       // [N, D]
  const std::int64_t* groups;  // [N], any values in any order
  std::int64_t num_samples;    // N
  std::int64_t dim;            // D
  std::int64_t max_group;      // of more members than this nothing is computed
  int num_threads;

  float* distance;  // out [N] in [0, 2]; 0 without another usable member; NaN for a non-finite row
};

// Identical rows are at distance exactly 0. Workspace: the features of num_threads groups. False,
// with nothing written, where a group has more than max_group members.
bool nearest_neighbor_cpu(const NearestNeighborParams& params);

}  // namespace gardo
