"""The C++ kernel of the GRPO loss, on CPU latents (see ``ops/sde/native.py``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gardo_kernels import core
from gardo_kernels.ops.sde.native import policy, row_scalars

#: Of the KL, the policy loss being a mean; or of both. In the order of the core's codes.
REDUCTIONS = ("gated", "batch", "sum")


def grpo_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    coef: Sequence[Tensor],
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    gate: Tensor | None,
    ref_velocity: Tensor | None,
    kl_coef: float,
    reduction: str,
    noise: Tensor | None,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``loss, stats [3] (policy_loss, kl, clip_fraction), log_prob, ratio, alpha, beta``.

    The ratio is clamped to ``[1 - clip_low, 1 + clip_high]``. Rows outside the gate do not read
    ``ref_velocity``. ``alpha`` and ``beta`` ``[B]`` are the weights of ``velocity_grad`` that give
    the gradient of the loss; with ``noise`` it is to take that for ``prev - a*x - b*v``.
    """
    velocity, sample, prev_sample = (x.contiguous() for x in (velocity, sample, prev_sample))
    velocity_uncond, ref_velocity = core.dense(velocity_uncond), core.dense(ref_velocity)
    noise, gate = core.dense(noise), core.dense(gate)
    old_log_prob, advantage = core.as_float32(old_log_prob), core.as_float32(advantage)
    call = core.require_core().grpo_loss
    arguments = policy(velocity, sample, velocity_uncond, guidance_scale)
    rows = arguments["rows"]
    loss, stats = core.float32(), core.float32(3)
    log_prob, ratio, alpha, beta = (core.float32(rows) for _ in range(4))
    call(
        **arguments,
        coef=row_scalars(coef, rows),
        prev_sample=core.latents("prev_sample", prev_sample, velocity),
        ref_velocity=core.latents("ref_velocity", ref_velocity, velocity),
        old_log_prob=core.array("old_log_prob", old_log_prob, torch.float32, (rows,)),
        advantage=core.array("advantage", advantage, torch.float32, (rows,)),
        gate=core.array("gate", gate, torch.bool, (rows,)),
        clip_low=1.0 - clip_low,
        clip_high=1.0 + clip_high,
        adv_clip=adv_clip,
        kl_coef=kl_coef,
        reduction=core.choice("reduction", reduction, REDUCTIONS),
        noise=core.latents("noise", noise, velocity),
        loss=loss.data_ptr(),
        stats=stats.data_ptr(),
        log_prob=log_prob.data_ptr(),
        ratio=ratio.data_ptr(),
        alpha=alpha.data_ptr(),
        beta=beta.data_ptr(),
    )
    return loss, stats, log_prob, ratio, alpha, beta
