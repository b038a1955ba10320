#include "groups.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace gardo {

using std::int64_t;

Groups sort_groups(const int64_t* ids, int64_t n) {
  std::vector<std::pair<int64_t, int64_t>> keyed(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < n; ++i) keyed[i] = {ids[i], i};
  if (!std::is_sorted(keyed.begin(), keyed.end())) std::sort(keyed.begin(), keyed.end());
  Groups groups;
  groups.order.resize(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    groups.order[i] = keyed[i].second;
    if (i == 0 || keyed[i].first != keyed[i - 1].first) groups.start.push_back(i);
  }
  groups.start.push_back(n);
  return groups;
}

Groups single_group(int64_t n) {
  Groups all;
  all.order.resize(static_cast<std::size_t>(n));
  std::iota(all.order.begin(), all.order.end(), int64_t{0});
  all.start = {0, n};
  return all;
}

}  // namespace gardo
