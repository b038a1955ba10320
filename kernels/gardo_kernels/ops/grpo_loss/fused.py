"""The fused GRPO loss as a PyTorch custom operator (see ``ops.sde.fused``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gardo_kernels.ops.sde.coefficients import SDECoefficients
from gardo_kernels.ops.sde.fused import kernels, velocity_grad


@torch.library.custom_op("gardo::grpo_loss", mutates_args=())
def _grpo_loss(
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


@_grpo_loss.register_fake
def _(velocity: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return velocity.new_empty(shape, dtype=torch.float32)

    batch = velocity.shape[0]
    return empty(), empty(3), empty(batch), empty(batch), empty(batch), empty(batch)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    velocity, sample, prev, _, _, a, b, *_, ref, _, _, uncond, guidance_scale, backend = inputs
    *_, alpha, beta = output
    ctx.save_for_backward(velocity, sample, prev, a, b, alpha, beta, ref, uncond)
    ctx.guidance_scale, ctx.backend = guidance_scale, backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    velocity, sample, prev, a, b, alpha, beta, ref, uncond = ctx.saved_tensors
    if grad is None:
        return (None,) * 20
    by_velocity, by_uncond = velocity_grad(
        grad,
        velocity,
        sample,
        prev,
        a,
        b,
        alpha,
        None if ref is None else beta,
        ref,
        uncond,
        ctx.guidance_scale,
        ctx.backend,
    )
    none = (None,) * 16
    return by_velocity, *none, None if uncond is None else by_uncond, None, None


_grpo_loss.register_autograd(_backward, setup_context=_setup)


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
        sample.detach(),
        prev_sample.detach(),
        old_log_prob.detach(),
        advantage.detach(),
        coef.a,
        coef.b,
        coef.scale,
        coef.offset,
        coef.kl,
        *clip_range,
        adv_clip,
        gate,
        None if ref_velocity is None else ref_velocity.detach(),
        kl_coef,
        kl_reduction,
        velocity_uncond,
        guidance_scale,
        backend,
    )
    policy_loss, kl, clip_fraction = stats.detach().unbind()
    return loss, policy_loss, kl, log_prob, ratio, clip_fraction
