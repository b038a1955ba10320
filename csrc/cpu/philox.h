// Philox4x32-10 (Salmon et al., SC 2011): four random words per counter.
#pragma once

#include <cstdint>

namespace gardo {

// The counters (first + i, row) and the key of a run of quads.
struct PhiloxQuads {
  std::uint64_t key, row, first;
  std::int64_t count;
};

// Word j of quad i goes to words[j][i]. Each words[j] has room for `count` rounded up to 8.
void philox_words(const PhiloxQuads& quads, std::uint32_t* const words[4]);

}  // namespace gardo
