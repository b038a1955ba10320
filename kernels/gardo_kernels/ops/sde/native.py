"""The C++ kernels of the SDE ops, on CPU latents.

Tensors are ``[B, ...]`` of one shape, each float32, float16 or bfloat16 on its own; ``coef`` is
``SDECoefficients.operands()``. Results do not depend on the number of threads, nor on the other
rows of the batch. Nothing here is differentiable: the gradients are functions of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gardo_kernels import core, host_memory
from gardo_kernels.ops.sde.coefficients import OPERANDS


def policy(
    velocity: Tensor, sample: Tensor, velocity_uncond: Tensor | None, guidance_scale: float
) -> dict[str, Any]:
    """Arguments of the core that say where the step starts and what the policy's velocity is."""
    return {
        **core.extent(velocity),
        "velocity": core.latents("velocity", velocity, velocity),
        "sample": core.latents("sample", sample, velocity),
        "velocity_uncond": core.latents("velocity_uncond", velocity_uncond, velocity),
        "guidance_scale": guidance_scale,
    }


def row_scalars(coef: Sequence[Tensor], rows: int) -> list[tuple[int, int]]:
    """Coefficients as the core takes them."""
    return [core.row_scalar(name, c, rows) for name, c in zip(OPERANDS, coef, strict=True)]


def sde_step(
    velocity: Tensor,
    sample: Tensor,
    coef: Sequence[Tensor],
    noise: Tensor | None,
    seed: Tensor | None,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``prev_sample, log_prob, mean`` in one pass, float32.

    The noise is ``noise``, or drawn from ``seed`` (one int64; the layout of ``philox.py``), or 0
    without either.
    """
    velocity, sample, noise = velocity.contiguous(), sample.contiguous(), core.dense(noise)
    velocity_uncond = core.dense(velocity_uncond)
    call = core.require_core().sde_step
    arguments = policy(velocity, sample, velocity_uncond, guidance_scale)
    rows = arguments["rows"]
    prev_sample = host_memory.empty(velocity.shape, torch.float32)
    mean = host_memory.empty(velocity.shape, torch.float32)
    log_prob = core.float32(rows)
    call(
        **arguments,
        coef=row_scalars(coef, rows),
        noise=core.latents("noise", noise, velocity),
        seed=0 if seed is None else core.array("seed", seed.reshape(-1), torch.int64, (1,)),
        prev_sample=prev_sample.data_ptr(),
        mean=mean.data_ptr(),
        log_prob=log_prob.data_ptr(),
    )
    return prev_sample, log_prob, mean


def sde_log_prob(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    coef: Sequence[Tensor],
    velocity_uncond: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """``log_prob [B]`` float32: the bits of :func:`sde_step` for the same velocity."""
    velocity, sample, prev_sample = (x.contiguous() for x in (velocity, sample, prev_sample))
    velocity_uncond = core.dense(velocity_uncond)
    call = core.require_core().sde_log_prob
    arguments = policy(velocity, sample, velocity_uncond, guidance_scale)
    rows = arguments["rows"]
    log_prob = core.float32(rows)
    call(
        **arguments,
        coef=row_scalars(coef, rows),
        prev_sample=core.latents("prev_sample", prev_sample, velocity),
        log_prob=log_prob.data_ptr(),
    )
    return log_prob


def velocity_grad(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    coef: Sequence[Tensor],
    grad: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    ref_velocity: Tensor | None,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    """``grad * (alpha*(prev - a*x - b*v) + beta*(v - v_ref))`` by both velocities, row by row.

    The gradient of every function of an affine step has this form. ``grad`` is float32, 0-d or
    ``[B]``; ``alpha`` and ``beta`` are ``[B]`` float32. A term whose weight is 0 in a row is left
    out there, whatever its tensors hold. The results have the dtypes of the velocities; without
    ``velocity_uncond`` the second is empty.
    """
    velocity, sample, prev_sample = (x.contiguous() for x in (velocity, sample, prev_sample))
    velocity_uncond, ref_velocity = core.dense(velocity_uncond), core.dense(ref_velocity)
    call = core.require_core().velocity_grad
    arguments = policy(velocity, sample, velocity_uncond, guidance_scale)
    rows = arguments["rows"]
    if beta is not None and ref_velocity is None:
        raise ValueError("ref_velocity: expected a tensor when beta is given, got None")
    by_velocity = host_memory.empty(velocity.shape, velocity.dtype)
    by_uncond = None
    if velocity_uncond is not None:
        by_uncond = host_memory.empty(velocity_uncond.shape, velocity_uncond.dtype)
    call(
        **arguments,
        coef=row_scalars(coef, rows),
        prev_sample=core.latents("prev_sample", prev_sample, velocity),
        ref_velocity=core.latents("ref_velocity", ref_velocity, velocity),
        alpha=core.array("alpha", alpha, torch.float32, (rows,)),
        beta=core.array("beta", beta, torch.float32, (rows,)),
        grad=core.row_scalar("grad", grad, rows),
        grad_velocity=core.latents("grad_velocity", by_velocity, velocity),
        grad_velocity_uncond=core.latents("grad_velocity_uncond", by_uncond, velocity),
    )
    return by_velocity, core.float32(0) if by_uncond is None else by_uncond
