#include "radix_sort.h"

#include <algorithm>

namespace gardo {
namespace {

using std::int64_t;

constexpr int kDigits = 8;          // of 8 bits each
constexpr int kValues = 256;        // of one digit
constexpr int64_t kFewItems = 256;  // below this, comparing is faster than counting

}  // namespace

void stable_sort_by_key(Keyed* items, Keyed* scratch, int64_t n) {
  const auto by_key = [](const Keyed& a, const Keyed& b) { return a.key < b.key; };
  if (n < kFewItems) {
    // std::stable_sort would allocate; ties are told apart by the position instead.
    std::copy(items, items + n, scratch);
    for (int64_t i = 0; i < n; ++i) items[i] = {scratch[i].key, i};
    std::sort(items, items + n, [](const Keyed& a, const Keyed& b) {
      return a.key < b.key || (a.key == b.key && a.index < b.index);
    });
    for (int64_t i = 0; i < n; ++i) items[i].index = scratch[items[i].index].index;
    return;
  }
  if (std::is_sorted(items, items + n, by_key)) return;
  int64_t counts[kDigits][kValues] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int digit = 0; digit < kDigits; ++digit) {
      ++counts[digit][(items[i].key >> (8 * digit)) & 0xff];
    }
  }
  Keyed* from = items;
  Keyed* to = scratch;
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = 8 * digit;
    if (counts[digit][(from[0].key >> shift) & 0xff] == n) continue;  // all keys agree here
    int64_t start[kValues];
    int64_t sum = 0;
    for (int value = 0; value < kValues; ++value) {
      start[value] = sum;
      sum += counts[digit][value];
    }
    for (int64_t i = 0; i < n; ++i) to[start[(from[i].key >> shift) & 0xff]++] = from[i];
    std::swap(from, to);
  }
  if (from != items) std::copy(from, from + n, items);
}

}  // namespace gardo
