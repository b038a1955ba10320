#include "policy_block.h"

#include "lanes.h"

namespace gardo {
namespace {

using std::int64_t;

// 32 lanes of at most 32 terms of a block each.
constexpr int kVectors = 4;

template <typename T, bool kGuided, typename V>
GARDO_INLINE inline T velocity_of(const PolicyBlock<V>& block, int64_t i) {
  const T cond = load_lanes<T>(block.cond + i);
  if constexpr (!kGuided) return cond;
  const T uncond = load_lanes<T>(block.uncond + i);
  return uncond + block.guidance_scale * (cond - uncond);
}

template <typename T, typename V>
GARDO_INLINE inline T mean_of(const PolicyBlock<V>& block, const T& velocity, int64_t i) {
  return block.a * load_lanes<T>(block.sample + i) + block.b * velocity;
}

template <typename V>
GARDO_INLINE inline double step(PolicyBlock<V> block, float c, const float* noise, float* prev,
                                float* mean) {
  double total[1];
  with_flag(block.uncond != nullptr, [&](auto guided) GARDO_INLINE {
    with_flag(noise != nullptr, [&](auto noisy) GARDO_INLINE {
      sum_lanes<kVectors>(block.n, total, [&](int64_t i, auto* out) GARDO_INLINE {
        using T = std::remove_pointer_t<decltype(out)>;
        const T m = mean_of(block, velocity_of<T, decltype(guided)::value>(block, i), i);
        T next = m;
        if constexpr (decltype(noisy)::value) next = m + c * load_lanes<T>(noise + i);
        store_lanes(m, mean + i);
        store_lanes(next, prev + i);
        *out = (next - m) * (next - m);
      });
    });
  });
  return total[0];
}

template <typename V>
GARDO_INLINE inline PolicySums sums(PolicyBlock<V> block, const float* prev, const V* ref, float c,
                                    const float* noise) {
  PolicySums result{};
  with_flag(block.uncond != nullptr, [&](auto guided) GARDO_INLINE {
    with_flag(ref != nullptr, [&](auto by_kl) GARDO_INLINE {
      with_flag(noise != nullptr, [&](auto by_noise) GARDO_INLINE {
        constexpr bool kKl = decltype(by_kl)::value, kNoise = decltype(by_noise)::value;
        double totals[1 + kKl + kNoise];
        sum_lanes<kVectors>(block.n, totals, [&](int64_t i, auto* out) GARDO_INLINE {
          using T = std::remove_pointer_t<decltype(out)>;
          const T v = velocity_of<T, decltype(guided)::value>(block, i);
          const T d = load_lanes<T>(prev + i) - mean_of(block, v, i);
          out[0] = d * d;
          if constexpr (kKl) {
            const T e = v - load_lanes<T>(ref + i);
            out[1] = e * e;
          }
          if constexpr (kNoise) {
            const T z = load_lanes<T>(noise + i);
            out[kKl ? 2 : 1] = z * (c * z - d);
          }
        });
        result.residual = totals[0];
        if constexpr (kKl) result.kl = totals[1];
        if constexpr (kNoise) result.shift = totals[kKl ? 2 : 1];
      });
    });
  });
  return result;
}

template <typename V>
GARDO_INLINE inline void gradient(PolicyBlock<V> block, float alpha, const float* prev, float beta,
                                  const V* ref, V* grad_cond, V* grad_uncond) {
  with_flag(block.uncond != nullptr, [&](auto guided) GARDO_INLINE {
    with_flag(prev != nullptr, [&](auto by_policy) GARDO_INLINE {
      with_flag(ref != nullptr, [&](auto by_kl) GARDO_INLINE {
        for_lanes(block.n, [&](auto lanes, int64_t i) GARDO_INLINE {
          using T = decltype(lanes);
          T grad{};
          const T v = velocity_of<T, decltype(guided)::value>(block, i);
          if constexpr (decltype(by_policy)::value)
            grad = alpha * (load_lanes<T>(prev + i) - mean_of(block, v, i));
          if constexpr (decltype(by_kl)::value) grad += beta * (v - load_lanes<T>(ref + i));
          if constexpr (decltype(guided)::value) {
            store_lanes(block.guidance_scale * grad, grad_cond + i);
            store_lanes((1.0f - block.guidance_scale) * grad, grad_uncond + i);
          } else {
            store_lanes(grad, grad_cond + i);
          }
        });
      });
    });
  });
}

}  // namespace

GARDO_CLONES double step_block(PolicyBlock<float> block, float c, const float* noise, float* prev,
                               float* mean) {
  return step(block, c, noise, prev, mean);
}

GARDO_CLONES double step_block(PolicyBlock<BFloat16> block, float c, const float* noise,
                               float* prev, float* mean) {
  return step(block, c, noise, prev, mean);
}

GARDO_CLONES PolicySums policy_sums(PolicyBlock<float> block, const float* prev, const float* ref,
                                    float c, const float* noise) {
  return sums(block, prev, ref, c, noise);
}

GARDO_CLONES PolicySums policy_sums(PolicyBlock<BFloat16> block, const float* prev,
                                    const BFloat16* ref, float c, const float* noise) {
  return sums(block, prev, ref, c, noise);
}

GARDO_CLONES void policy_gradient(PolicyBlock<float> block, float alpha, const float* prev,
                                  float beta, const float* ref, float* grad_cond,
                                  float* grad_uncond) {
  gradient(block, alpha, prev, beta, ref, grad_cond, grad_uncond);
}

GARDO_CLONES void policy_gradient(PolicyBlock<BFloat16> block, float alpha, const float* prev,
                                  float beta, const BFloat16* ref, BFloat16* grad_cond,
                                  BFloat16* grad_uncond) {
  gradient(block, alpha, prev, beta, ref, grad_cond, grad_uncond);
}

}  // namespace gardo
