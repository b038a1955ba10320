"""The fused SDE ops as PyTorch custom operators: fake tensors, autograd, choice of kernels.

An operator is opaque to ``torch.compile``: compiled or not, the same kernels run and give the same
bits. The reference form is not wrapped; it is ordinary differentiable PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gardo_kernels._operators import (
    below_autograd,
    differentiable_operator,
    keep,
    kernels,
    operator,
    without_grad,
)
from gardo_kernels.ops.sde.coefficients import SDECoefficients


def _step_kernel(
    velocity: Tensor,
    sample: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    scale: Tensor,
    offset: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels("sde", backend).sde_step(
        velocity, sample, a, b, c, scale, offset, noise, seed, velocity_uncond, guidance_scale
    )


def _step_fake(velocity: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    prev = velocity.new_empty(velocity.shape, dtype=torch.float32)
    return prev, velocity.new_empty(velocity.shape[0], dtype=torch.float32), torch.empty_like(prev)


_sde_step = operator("sde_step", _step_kernel, _step_fake)


def _grad_kernel(
    grad: Tensor,
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    ref_velocity: Tensor | None,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``grad * (alpha*(prev - a*x - b*v) + beta*(v - v_ref))`` by both velocities.

    The gradient of every loss of an affine step has this form. ``grad`` is 0-d or ``[B]``. Without
    ``velocity_uncond`` the second result is empty.
    """
    by_velocity, by_uncond = kernels("sde", backend).velocity_grad(
        grad,
        velocity,
        sample,
        prev_sample,
        a,
        b,
        alpha,
        beta,
        ref_velocity,
        velocity_uncond,
        guidance_scale,
    )
    return by_velocity, velocity.new_empty(0) if by_uncond is None else by_uncond


def _grad_fake(
    grad: Tensor,
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    ref_velocity: Tensor | None,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    by_velocity = velocity.new_empty(velocity.shape)
    if velocity_uncond is None:
        return by_velocity, velocity.new_empty(0)
    return by_velocity, velocity_uncond.new_empty(velocity.shape)


velocity_grad = operator("velocity_grad", _grad_kernel, _grad_fake)


def _log_prob_kernel(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    offset: Tensor,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    backend: str,
) -> Tensor:
    return kernels("sde", backend).sde_log_prob(
        velocity, sample, prev_sample, a, b, scale, offset, velocity_uncond, guidance_scale
    )


def _log_prob_fake(velocity: Tensor, *rest: Any) -> Tensor:
    return velocity.new_empty(velocity.shape[0], dtype=torch.float32)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        velocity, sample, prev, a, b, scale, _, uncond, ctx.guidance_scale, ctx.backend = args
        keep(ctx, velocity, sample, prev, a, b, scale, uncond)
        return below_autograd(_op, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        velocity, sample, prev, a, b, scale, uncond = ctx.saved_tensors
        batch = velocity.shape[0]
        n = velocity.numel() // max(batch, 1)
        alpha = (2 / max(n, 1) * scale * b).expand(batch).contiguous()
        options = (uncond, ctx.guidance_scale, ctx.backend)
        by_velocity, by_uncond = velocity_grad(
            grad, velocity, sample, prev, a, b, alpha, None, None, *options
        )
        return by_velocity, *(None,) * 6, None if uncond is None else by_uncond, None, None


_op, _sde_log_prob = differentiable_operator(
    "sde_log_prob", _log_prob_kernel, _log_prob_fake, _LogProb
)


def sde_step(
    velocity: Tensor,
    sample: Tensor,
    coef: SDECoefficients,
    noise: Tensor | None,
    seed: Tensor | None,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``prev_sample, log_prob, mean`` by the kernels of ``backend``."""
    return _sde_step(
        without_grad(velocity),
        without_grad(sample),
        coef.a,
        coef.b,
        coef.c,
        coef.scale,
        coef.offset,
        None if noise is None else without_grad(noise),
        seed,
        None if velocity_uncond is None else without_grad(velocity_uncond),
        guidance_scale,
        backend,
    )


def sde_log_prob(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    coef: SDECoefficients,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    backend: str,
) -> Tensor:
    """``log_prob [B]`` by the kernels of ``backend``, differentiable in the velocities."""
    return _sde_log_prob(
        velocity,
        without_grad(sample),
        without_grad(prev_sample),
        coef.a,
        coef.b,
        coef.scale,
        coef.offset,
        velocity_uncond,
        guidance_scale,
        backend,
    )
