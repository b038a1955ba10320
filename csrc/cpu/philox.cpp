#include "philox.h"

#ifdef GARDO_HAS_TARGET_CLONES
#include <immintrin.h>
#endif

namespace gardo {
namespace {

using std::int64_t;
using std::uint32_t;
using std::uint64_t;

constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

uint32_t low_word(uint64_t x) {
  return static_cast<uint32_t>(x);
}
uint32_t high_word(uint64_t x) {
  return static_cast<uint32_t>(x >> 32);
}

void philox_portable(const PhiloxQuads& q, uint32_t* const words[4]) {
  for (int64_t i = 0; i < q.count; ++i) {
    const uint64_t counter = q.first + static_cast<uint64_t>(i);
    uint32_t c0 = low_word(counter), c1 = high_word(counter);
    uint32_t c2 = low_word(q.row), c3 = high_word(q.row);
    uint32_t k0 = low_word(q.key), k1 = high_word(q.key);
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t p0 = uint64_t{kMultiplier0} * c0;
      const uint64_t p1 = uint64_t{kMultiplier1} * c2;
      c0 = high_word(p1) ^ c1 ^ k0;
      c1 = low_word(p1);
      c2 = high_word(p0) ^ c3 ^ k1;
      c3 = low_word(p0);
      k0 += kWeyl0;
      k1 += kWeyl1;
    }
    words[0][i] = c0;
    words[1][i] = c1;
    words[2][i] = c2;
    words[3][i] = c3;
  }
}

#ifdef GARDO_HAS_TARGET_CLONES

// Four quads, one to a 64-bit lane. Only the low halves count: the multiplication reads nothing
// else, so what the products leave in the high halves need not be cleared.
struct Lanes {
  __m256i c0, c1, c2, c3;
};

__attribute__((target("avx2"), always_inline)) inline void philox_round(Lanes& s, __m256i k0,
                                                                        __m256i k1) {
  const __m256i p0 = _mm256_mul_epu32(s.c0, _mm256_set1_epi64x(kMultiplier0));
  const __m256i p1 = _mm256_mul_epu32(s.c2, _mm256_set1_epi64x(kMultiplier1));
  s.c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), s.c1), k0);
  s.c1 = p1;
  s.c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), s.c3), k1);
  s.c3 = p0;
}

// The low halves of `even` and `odd`, alternating.
__attribute__((target("avx2"), always_inline)) inline void store_words(__m256i even, __m256i odd,
                                                                       uint32_t* out) {
  const __m256i words = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words);
}

// Eight quads at a time, up to 7 more than asked for.
__attribute__((target("avx2"))) void philox_avx2(const PhiloxQuads& q, uint32_t* const words[4]) {
  __m256i keys[kRounds][2];
  uint32_t k0 = low_word(q.key), k1 = high_word(q.key);
  for (auto& key : keys) {
    key[0] = _mm256_set1_epi64x(k0);
    key[1] = _mm256_set1_epi64x(k1);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  const __m256i row_low = _mm256_set1_epi64x(low_word(q.row));
  const __m256i row_high = _mm256_set1_epi64x(high_word(q.row));
  for (int64_t i = 0; i < q.count; i += 8) {
    const auto first = static_cast<int64_t>(q.first + static_cast<uint64_t>(i));
    const __m256i even = _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_set_epi64x(6, 4, 2, 0));
    const __m256i odd = _mm256_add_epi64(even, _mm256_set1_epi64x(1));
    Lanes a{even, _mm256_srli_epi64(even, 32), row_low, row_high};
    Lanes b{odd, _mm256_srli_epi64(odd, 32), row_low, row_high};
    for (const auto& key : keys) {
      philox_round(a, key[0], key[1]);
      philox_round(b, key[0], key[1]);
    }
    store_words(a.c0, b.c0, words[0] + i);
    store_words(a.c1, b.c1, words[1] + i);
    store_words(a.c2, b.c2, words[2] + i);
    store_words(a.c3, b.c3, words[3] + i);
  }
}

const bool kHasAvx2 = __builtin_cpu_supports("avx2") != 0;

#endif

}  // namespace

void philox_words(const PhiloxQuads& quads, uint32_t* const words[4]) {
#ifdef GARDO_HAS_TARGET_CLONES
  if (kHasAvx2) return philox_avx2(quads, words);
#endif
  philox_portable(quads, words);
}

}  // namespace gardo
