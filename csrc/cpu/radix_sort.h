// Sorting of samples by 64-bit keys, and the keys of the types that are sorted.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace gardo {

struct Keyed {
  std::uint64_t key;
  std::int64_t index;
};

// Keys in the order of the values.
inline std::uint64_t key_of(std::int64_t value) {
  return static_cast<std::uint64_t>(value) ^ (std::uint64_t{1} << 63);
}

// `value` is not NaN; -0 and 0 have the same key.
inline std::uint64_t key_of(double value) {
  const double no_negative_zero = value + 0.0;
  std::uint64_t raw;
  std::memcpy(&raw, &no_negative_zero, sizeof(raw));
  return raw >> 63 != 0 ? ~raw : raw | (std::uint64_t{1} << 63);
}

// Sorts items[0, n) by key, equal keys by index; scratch[0, n) is overwritten.
void sort_by_key(Keyed* items, Keyed* scratch, std::int64_t n);

}  // namespace gardo
