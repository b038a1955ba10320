// Fresh memory for large results in 2 MiB pages.
//
// A step writes megabytes into memory that the allocator has just got from the system. Where that
// arrives in 4 KiB pages, the page faults take several times as long as the arithmetic.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "latents.h"

namespace gardo {

// A request, no more: memory that is there already, and other systems, stay as they are.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::int64_t bytes) {
#ifdef __linux__
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (address + static_cast<std::uintptr_t>(bytes)) / kPage * kPage;
  if (data != nullptr && begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

inline void prefer_huge_pages(const Latents& latents, const Extent& extent) {
  const int bytes = latents.dtype == DType::kFloat32 ? 4 : 2;
  prefer_huge_pages(latents.data, extent.rows * extent.row_size * bytes);
}

}  // namespace gardo
