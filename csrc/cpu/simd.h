// Vector types and function multiversioning: one portable binary that uses AVX-512 or AVX2 where
// the processor has them (chosen when the library is loaded).
#pragma once

#include <cstdint>

// Set by CMake where the compiler and the C library can do it.
#ifdef GARDO_HAS_TARGET_CLONES
#define GARDO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GARDO_CLONES
#endif

// For everything that a clone calls: compiled with the clone, for its instruction set.
#define GARDO_INLINE __attribute__((always_inline))

namespace gardo {

// GCC's and Clang's vector extension; the compiler splits it where registers are narrower.
typedef float Float8 __attribute__((vector_size(32)));
typedef std::uint32_t UInt32x8 __attribute__((vector_size(32)));
typedef std::uint16_t UInt16x8 __attribute__((vector_size(16)));

}  // namespace gardo
