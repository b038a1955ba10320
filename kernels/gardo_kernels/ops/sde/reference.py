"""Plain PyTorch form of the affine SDE step and its log-probability: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels.ops.sde.coefficients import SDECoefficients
from gardo_kernels.row_sums import row_mean


def guided(velocity: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: ``v_u + g*(v_c - v_u)``."""
    if uncond is None:
        return velocity
    return uncond + guidance_scale * (velocity - uncond)


def row_coefficient(value: Tensor, like: Tensor) -> Tensor:
    """A 0-d or ``[B]`` coefficient in the dtype of ``like``, shaped to multiply ``[B, ...]``."""
    value = value.to(like.dtype)
    return value if value.dim() == 0 else value.view(-1, *([1] * (like.dim() - 1)))


def transition_mean(velocity: Tensor, sample: Tensor, coef: SDECoefficients) -> Tensor:
    """``a*x + b*v``."""
    return row_coefficient(coef.a, sample) * sample + row_coefficient(coef.b, sample) * velocity


def log_prob_of(prev_sample: Tensor, mean: Tensor, coef: SDECoefficients) -> Tensor:
    """``offset - scale * mean_over_latent((prev - mean)^2)``, ``[B]``.

    Both sampling and training end here, on the stored ``prev_sample``, so equal velocities give
    equal bits.
    """
    squared = row_mean((prev_sample - mean).square())
    return coef.offset.to(mean.dtype) - coef.scale.to(mean.dtype) * squared


def sde_step(
    velocity: Tensor,
    sample: Tensor,
    coef: SDECoefficients,
    noise: Tensor | None,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``prev_sample``, ``log_prob`` and ``mean``; ``noise`` None stands for zero."""
    uncond = None if velocity_uncond is None else velocity_uncond.to(dtype)
    mean = transition_mean(
        guided(velocity.to(dtype), uncond, guidance_scale), sample.to(dtype), coef
    )
    prev = mean if noise is None else mean + row_coefficient(coef.c, mean) * noise.to(dtype)
    return prev, log_prob_of(prev, mean, coef), mean


def sde_log_prob(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    coef: SDECoefficients,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Log-probability of ``prev_sample``, differentiable in the velocities."""
    uncond = None if velocity_uncond is None else velocity_uncond.to(dtype)
    mean = transition_mean(
        guided(velocity.to(dtype), uncond, guidance_scale), sample.detach().to(dtype), coef
    )
    return log_prob_of(prev_sample.detach().to(dtype), mean, coef)
