// Standard normals that depend on nothing but the seed, the row and the place in the row.
#pragma once

#include <cstdint>

namespace gardo {

// The normals of elements [offset, offset + n) of a row; offset is a multiple of 4.
void philox_normal(std::uint64_t seed, std::int64_t row, std::int64_t offset, std::int64_t n,
                   float* out);

}  // namespace gardo
