"""CPU kernels of the SDE ops (see ``_native`` and ``csrc``), in the signatures of ``fused``."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from gardo_kernels import _native


def _dense(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def sde_step(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """``prev_sample, log_prob, mean``; without ``noise`` and ``seed`` no noise is added."""
    step = _native.sde_step(
        velocity.contiguous(),
        sample.contiguous(),
        a,
        b,
        c,
        scale,
        offset,
        _dense(noise),
        seed,
        _dense(velocity_uncond),
        guidance_scale,
    )
    return step.prev_sample, step.log_prob, cast(Tensor, step.mean)  # it was asked for


def sde_log_prob(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    offset: Tensor,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """``log_prob [B]``."""
    return _native.sde_log_prob(
        velocity.contiguous(),
        sample.contiguous(),
        prev_sample.contiguous(),
        a,
        b,
        scale,
        offset,
        _dense(velocity_uncond),
        guidance_scale,
    )


def velocity_grad(
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
) -> tuple[Tensor, Tensor | None]:
    """``grad * (alpha*(prev - a*x - b*v) + beta*(v - v_ref))`` by both velocities."""
    return _native.affine_backward(
        velocity.contiguous(),
        sample.contiguous(),
        prev_sample.contiguous(),
        a,
        b,
        alpha,
        beta,
        _dense(ref_velocity),
        _dense(velocity_uncond),
        guidance_scale,
        grad,
    )
