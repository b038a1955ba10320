// Coefficients of SDE steps as the ops on latents take them.
#pragma once

#include "args.h"
#include "sde_step.h"

namespace gardo {
namespace bindings {

// In the order of `OPERANDS` in ops/sde/coefficients.py.
inline SdeCoefficients sde_coefficients(const Args& args, bool needed) {
  const auto [a, b, c, scale, offset, kl] = args.scalars<6>("coef", needed);
  return {a, b, c, scale, offset, kl};
}

}  // namespace bindings
}  // namespace gardo
