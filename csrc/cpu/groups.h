// Samples sorted by group, and OpenMP's thread number where there is OpenMP.
#pragma once

#include <cstdint>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace gardo {

// Sample indices ordered by group, and within a group by index; `start` delimits the groups.
struct Groups {
  std::vector<std::int64_t> order;
  std::vector<std::int64_t> start;

  std::int64_t count() const { return static_cast<std::int64_t>(start.size()) - 1; }
};

Groups sort_groups(const std::int64_t* ids, std::int64_t n);

// All samples as one group.
Groups single_group(std::int64_t n);

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace gardo
