// The bits of a value as another type of the same size.
#pragma once

#include <cstring>

namespace gardo {

template <typename To, typename From>
__attribute__((always_inline)) inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits: sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace gardo
