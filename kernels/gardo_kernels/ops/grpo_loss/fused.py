"""The fused GRPO loss as a PyTorch custom operator (see ``ops.sde.fused``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gardo_kernels._operators import (
    below_autograd,
    differentiable_operator,
    keep,
    kernels,
    without_grad,
)
from gardo_kernels.ops.sde.coefficients import SDECoefficients
from gardo_kernels.ops.sde.fused import velocity_grad


def _kernel(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    offset: Tensor,
    kl: Tensor,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    gate: Tensor | None,
    ref_velocity: Tensor | None,
    kl_coef: float,
    kl_reduction: str,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernels("grpo_loss", backend).grpo_loss(
        velocity,
        sample,
        prev_sample,
        old_log_prob,
        advantage,
        a,
        b,
        scale,
        offset,
        kl,
        clip_low,
        clip_high,
        adv_clip,
        gate,
        ref_velocity,
        kl_coef,
        kl_reduction,
        velocity_uncond,
        guidance_scale,
    )


def _fake(velocity: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return velocity.new_empty(shape, dtype=torch.float32)

    batch = velocity.shape[0]
    return empty(), empty(3), empty(batch), empty(batch), empty(batch), empty(batch)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        velocity, sample, prev, _, _, a, b, *_, ref, _, _, uncond, scale, backend = args
        loss, *rest = below_autograd(_op, *args)
        *_, alpha, beta = rest
        keep(ctx, velocity, sample, prev, a, b, alpha, beta, ref, uncond)
        ctx.guidance_scale, ctx.backend = scale, backend
        ctx.mark_non_differentiable(*rest)
        return loss, *rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        velocity, sample, prev, a, b, alpha, beta, ref, uncond = ctx.saved_tensors
        beta = None if ref is None else beta
        options = (uncond, ctx.guidance_scale, ctx.backend)
        by_velocity, by_uncond = velocity_grad(
            grad, velocity, sample, prev, a, b, alpha, beta, ref, *options
        )
        return by_velocity, *(None,) * 16, None if uncond is None else by_uncond, None, None


_op, _grpo_loss = differentiable_operator("grpo_loss", _kernel, _fake, _Loss)


def grpo_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    coef: SDECoefficients,
    clip_range: tuple[float, float],
    adv_clip: float,
    gate: Tensor | None,
    ref_velocity: Tensor | None,
    kl_coef: float,
    kl_reduction: str,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """``loss, policy_loss, kl, log_prob, ratio, clip_fraction`` by the kernels of ``backend``."""
    loss, stats, log_prob, ratio, _, _ = _grpo_loss(
        velocity,
        without_grad(sample),
        without_grad(prev_sample),
        without_grad(old_log_prob),
        without_grad(advantage),
        coef.a,
        coef.b,
        coef.scale,
        coef.offset,
        coef.kl,
        *clip_range,
        adv_clip,
        gate,
        None if ref_velocity is None else without_grad(ref_velocity),
        kl_coef,
        kl_reduction,
        velocity_uncond,
        guidance_scale,
        backend,
    )
    policy_loss, kl, clip_fraction = stats.unbind()
    return loss, policy_loss, kl, log_prob, ratio, clip_fraction
