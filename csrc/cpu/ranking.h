// Ranks of rewards within a scope: the whole batch or a group.
#pragma once

#include <cstdint>

#include "radix_sort.h"

namespace gardo {

// Fewer samples are done before a second thread has woken up.
constexpr std::int64_t kParallelSamples = 1024;

// The valid ones of `members`, sorted by reward (best first if `descending`), equal rewards in the
// order of `members`; returns their number. `ranked` and `scratch` hold n entries.
std::int64_t rank_members(const double* reward, const std::int64_t* members, std::int64_t n,
                          const std::uint8_t* valid, bool descending, Keyed* ranked,
                          Keyed* scratch);

// Points of each ranked sample: 2 for a win, `tie` for a tie, so that one half is an exact integer.
void doubled_wins(const Keyed* ranked, std::int64_t count, std::int64_t tie, std::int64_t* wins);

}  // namespace gardo
