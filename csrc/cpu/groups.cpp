#include "groups.h"

#include <numeric>

#include "radix_sort.h"

namespace gardo {

using std::int64_t;

Groups sort_groups(const int64_t* ids, int64_t n) {
  std::vector<Keyed> keyed(static_cast<std::size_t>(n)), scratch(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < n; ++i) keyed[i] = {key_of(ids[i]), i};
  sort_by_key(keyed.data(), scratch.data(), n);
  Groups groups;
  groups.order.resize(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    groups.order[i] = keyed[i].index;
    if (i == 0 || keyed[i].key != keyed[i - 1].key) groups.start.push_back(i);
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
