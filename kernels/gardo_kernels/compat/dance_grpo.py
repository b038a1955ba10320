"""Drop-in for DanceGRPO (https://github.com/XueZeyue/DanceGRPO): its Flux step."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels import checks
from gardo_kernels.ops.sde import SDECoefficients, sde_coefficients, sde_log_prob, sde_step
from gardo_kernels.ops.sde.coefficients import gaussian_coefficients
from gardo_kernels.ops.sde.reference import transition_mean

__all__ = ["flux_step"]


def flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
) -> tuple[Tensor, ...]:
    """One step of the schedule ``sigmas`` at ``index``.

    Args:
        model_output, latents: ``[B, ...]``.
        eta: amount of noise.
        sigmas: ``[T + 1]``, falling.
        index: position of the step, ``0 <= index < T``.
        prev_sample: latents to evaluate; None draws them (with PyTorch's default generator).
        grpo: whether a sample and its log-probability are wanted.
        sde_solver: whether the mean has the score term of the SDE.

    Returns:
        With ``grpo``: ``(prev_sample, pred_original_sample, log_prob)``; without:
        ``(prev_sample_mean, pred_original_sample)``. float32; everything but a ``prev_sample`` is
        differentiable in ``model_output``.

    Raises ``TypeError``/``ValueError`` for wrong types, shapes or values.
    """
    checks.latents("model_output", model_output)
    checks.latents("latents", latents, like=model_output)
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(f"index: expected an int, got {type(index).__name__}")
    if not 0 <= index < len(sigmas) - 1:
        raise ValueError(f"index: expected a step in [0, {len(sigmas) - 2}], got {index}")
    velocity, current = model_output.float(), latents.float()
    sigma, sigma_next = sigmas[index], sigmas[index + 1]
    coef = _coefficients(sigma, sigma_next, eta, sde_solver).to(velocity.device)
    original = current - sigma.to(velocity.device) * velocity
    if not grpo:
        return transition_mean(velocity, current, coef), original
    if prev_sample is None:
        prev_sample = sde_step(velocity, current, coef).prev_sample
    return prev_sample, original, sde_log_prob(velocity, current, prev_sample, coef)


def _coefficients(
    sigma: Tensor, sigma_next: Tensor, eta: float, sde_solver: bool
) -> SDECoefficients:
    coef = sde_coefficients(sigma, sigma_next, eta, "dance")
    if sde_solver:
        return coef
    # Without the score term the mean is that of the ODE; the noise stays.
    ode = sde_coefficients(sigma, sigma_next, kind="ode")
    return gaussian_coefficients(torch.ones_like(coef.a), ode.b, coef.c)
