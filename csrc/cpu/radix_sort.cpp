#include "radix_sort.h"

#include <algorithm>

namespace gardo {
namespace {

using std::int64_t;

constexpr int kKeyBits = 64;
constexpr int kDigitBits = 8;
constexpr int kValues = 1 << kDigitBits;
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
  std::uint64_t differing = 0;
  for (int64_t i = 0; i < n; ++i) differing |= items[i].key ^ items[0].key;
  Keyed* from = items;
  Keyed* to = scratch;
  for (int shift = 0; shift < kKeyBits; shift += kDigitBits) {
    const auto digit = [shift](const Keyed& item) { return (item.key >> shift) & (kValues - 1); };
    if (((differing >> shift) & (kValues - 1)) == 0) continue;  // all keys agree here
    int64_t start[kValues + 1] = {};
    for (int64_t i = 0; i < n; ++i) ++start[digit(from[i]) + 1];
    for (int value = 0; value < kValues; ++value) start[value + 1] += start[value];
    for (int64_t i = 0; i < n; ++i) to[start[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
  if (from != items) std::copy(from, from + n, items);
}

}  // namespace gardo
