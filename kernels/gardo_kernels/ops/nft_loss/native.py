"""The C++ kernels of the DiffusionNFT loss, on CPU latents (see ``ops/sde/native.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gardo_kernels import core, host_memory

#: In the order of the core's codes.
REDUCTIONS = ("mean", "sum")


def _tensors(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    ref_velocity: Tensor | None,
) -> dict[str, Any]:
    size = core.extent(velocity)
    return {
        **size,
        "velocity": core.latents("velocity", velocity, velocity),
        "old_velocity": core.latents("old_velocity", old_velocity, velocity),
        "x0": core.latents("x0", x0, velocity),
        "xt": core.latents("xt", xt, velocity),
        "ref_velocity": core.latents("ref_velocity", ref_velocity, velocity),
        "t": core.row_scalar("t", t, size["rows"]),
    }


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    advantage: Tensor,
    beta: float,
    adv_clip: float,
    gate: Tensor | None,
    ref_velocity: Tensor | None,
    kl_coef: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss``, ``stats [2]`` (policy_loss, kl), ``weights [3, B]`` of the gradient.

    Rows outside the gate do not read ``ref_velocity``; no gated row gives KL 0.
    """
    velocity, old_velocity = velocity.contiguous(), old_velocity.contiguous()
    x0, xt, ref_velocity = x0.contiguous(), xt.contiguous(), core.dense(ref_velocity)
    gate = core.dense(gate)
    t, advantage = core.as_float32(t), core.as_float32(advantage)
    call = core.require_core().nft_loss
    arguments = _tensors(velocity, old_velocity, x0, xt, t, ref_velocity)
    rows = arguments["rows"]
    loss, stats, weights = core.float32(), core.float32(2), core.float32(3, rows)
    call(
        **arguments,
        beta=beta,
        advantage=core.array("advantage", advantage, torch.float32, (rows,)),
        gate=core.array("gate", gate, torch.bool, (rows,)),
        adv_clip=adv_clip,
        kl_coef=kl_coef,
        reduction=core.choice("reduction", reduction, REDUCTIONS),
        loss=loss.data_ptr(),
        stats=stats.data_ptr(),
        weights=weights.data_ptr(),
    )
    return loss, stats, weights


def nft_grad(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    grad: Tensor,
    weights: Tensor,
    beta: float,
    ref_velocity: Tensor | None,
) -> Tensor:
    """Gradient of the loss by ``velocity``, times the 0-d ``grad``, in velocity's dtype.

    ``weights[0]*e+ + weights[1]*e- + weights[2]*(v - v_ref)`` per row, with the errors of the two
    implicit predictions.
    """
    velocity, old_velocity = velocity.contiguous(), old_velocity.contiguous()
    x0, xt, ref_velocity = x0.contiguous(), xt.contiguous(), core.dense(ref_velocity)
    t, scaled = core.as_float32(t), weights * grad
    call = core.require_core().nft_grad
    arguments = _tensors(velocity, old_velocity, x0, xt, t, ref_velocity)
    by_velocity = host_memory.empty(velocity.shape, velocity.dtype)
    call(
        **arguments,
        beta=beta,
        weights=core.array("weights", scaled, torch.float32, (3, arguments["rows"])),
        grad_velocity=core.latents("grad_velocity", by_velocity, velocity),
    )
    return by_velocity
