#include "radix_sort.h"

#include <algorithm>

namespace gardo {
namespace {

using std::int64_t;

constexpr int kDigitBits = 11;
constexpr int kValues = 1 << kDigitBits;
constexpr int64_t kFewItems = 256;       // below this, comparing is faster than counting
constexpr int64_t kManyItems = 1 << 16;  // from here a third pass pays

constexpr auto less = [](const Keyed& a, const Keyed& b) {
  return a.key < b.key || (a.key == b.key && a.index < b.index);
};

int bit_width(std::uint64_t value) {
  int width = 0;
  for (; value != 0; value >>= 1) ++width;
  return width;
}

}  // namespace

void sort_by_key(Keyed* items, Keyed* scratch, int64_t n) {
  if (n < kFewItems) {
    std::sort(items, items + n, less);
    return;
  }
  if (std::is_sorted(items, items + n, less)) return;
  std::uint64_t differing = 0;
  for (int64_t i = 0; i < n; ++i) differing |= items[i].key ^ items[0].key;

  // Counting sorts by the highest digits that differ, the lower of them first.
  const int passes = n < kManyItems ? 2 : 3;
  const int low = std::max(0, bit_width(differing) - passes * kDigitBits);
  Keyed* from = items;
  Keyed* to = scratch;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = low + pass * kDigitBits;
    const auto digit = [shift](const Keyed& item) { return (item.key >> shift) & (kValues - 1); };
    if (((differing >> shift) & (kValues - 1)) == 0) continue;  // all keys agree here
    int64_t start[kValues + 1] = {};
    for (int64_t i = 0; i < n; ++i) ++start[digit(from[i]) + 1];
    for (int value = 0; value < kValues; ++value) start[value + 1] += start[value];
    for (int64_t i = 0; i < n; ++i) to[start[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
  if (from != items) std::copy(from, from + n, items);
  if (low == 0) return;

  // Few neighbours still agree in all those digits.
  for (int64_t begin = 0, end = 0; begin < n; begin = end) {
    const std::uint64_t high = items[begin].key >> low;
    for (end = begin + 1; end < n && items[end].key >> low == high; ++end) {
    }
    if (end - begin > 1) std::sort(items + begin, items + end, less);
  }
}

}  // namespace gardo
