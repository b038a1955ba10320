// Sizes up to which the CUDA group statistics take one launch; larger ones are sorted.
#pragma once

#include <cstdint>

namespace gardo {

constexpr std::int64_t kOneLaunchSamples = 4096;
constexpr std::int64_t kOneLaunchAux = 16;

}  // namespace gardo
