#include "ranking.h"

namespace gardo {

using std::int64_t;

int64_t rank_members(const double* reward, const int64_t* members, int64_t n,
                     const std::uint8_t* valid, bool descending, Keyed* ranked, Keyed* scratch) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t i = members[j];
    if (!valid[i]) continue;
    const std::uint64_t key = key_of(reward[i]);
    ranked[count++] = {descending ? ~key : key, i};
  }
  sort_by_key(ranked, scratch, count);
  return count;
}

void doubled_wins(const Keyed* ranked, int64_t count, int64_t tie, int64_t* wins) {
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && ranked[end].key == ranked[begin].key) ++end;
    const int64_t points = 2 * begin + tie * (end - begin - 1);
    for (int64_t j = begin; j < end; ++j) wins[ranked[j].index] = points;
  }
}

}  // namespace gardo
