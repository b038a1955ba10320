"""Tensor signatures of the C++ core: steps and losses on latents (see ``_native``)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gardo_kernels import _host_memory
from gardo_kernels._native_core import (
    array,
    choice,
    extent,
    float32,
    latents,
    require_core,
    row_scalar,
)

KL_REDUCTIONS = ("gated", "batch")
_ONE = torch.ones((), dtype=torch.float32, device="cpu")


def _policy(
    velocity: Tensor, velocity_uncond: Tensor | None, guidance_scale: float
) -> dict[str, Any]:
    return {
        **extent(velocity),
        "velocity": latents("velocity", velocity, velocity),
        "velocity_uncond": latents("velocity_uncond", velocity_uncond, velocity),
        "guidance_scale": guidance_scale,
    }


def _row_scalars(rows: int, **tensors: Tensor) -> dict[str, tuple[int, int]]:
    return {name: row_scalar(name, tensor, rows) for name, tensor in tensors.items()}


def _addresses(values: Tensor) -> list[int]:
    """Of each part of a contiguous float32 tensor along its first axis."""
    step = 4 * values.stride(0)
    return [values.data_ptr() + step * index for index in range(len(values))]


class NativeStep(NamedTuple):
    """What :func:`sde_step` returns, float32."""

    prev_sample: Tensor  # [B, ...]
    log_prob: Tensor  # [B]
    mean: Tensor | None  # [B, ...]


def sde_step(
    velocity: Tensor,
    sample: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    scale: Tensor,
    offset: Tensor,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    want_mean: bool = True,
) -> NativeStep:
    """``mean = a*x + b*v``, ``prev = mean + c*z`` and its log-probability, in one pass.

    ``z`` is ``noise``, or drawn from ``seed`` (one-element int64 tensor; the layout of
    ``ops/sde/philox.py``), or 0 without either. With ``velocity_uncond`` the velocity is
    ``u + guidance_scale * (v - u)``. ``want_mean=False`` saves writing the mean.
    """
    core = require_core()
    policy = _policy(velocity, velocity_uncond, guidance_scale)
    rows = policy["rows"]
    if noise is not None and seed is not None:
        raise ValueError("seed: expected None when noise is given, got both")
    prev_sample = _host_memory.empty(velocity.shape, torch.float32)
    mean = _host_memory.empty(velocity.shape, torch.float32) if want_mean else None
    log_prob = float32(rows)
    core.sde_step(
        **policy,
        **_row_scalars(rows, a=a, b=b, c=c, scale=scale, offset=offset),
        sample=latents("sample", sample, velocity),
        noise=latents("noise", noise, velocity),
        seed=0 if seed is None else array("seed", seed.reshape(-1), torch.int64, (1,)),
        prev_sample=prev_sample.data_ptr(),
        mean=0 if mean is None else mean.data_ptr(),
        log_prob=log_prob.data_ptr(),
    )
    return NativeStep(prev_sample, log_prob, mean)


def sde_log_prob(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    offset: Tensor,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Log-probability ``[B]`` float32: the bits of :func:`sde_step` for the same velocity.

    Backward: :func:`affine_backward` with ``alpha = grad * 2 * scale * b / row_size``.
    """
    core = require_core()
    policy = _policy(velocity, velocity_uncond, guidance_scale)
    log_prob = float32(policy["rows"])
    core.sde_log_prob(
        **policy,
        **_row_scalars(policy["rows"], a=a, b=b, scale=scale, offset=offset),
        sample=latents("sample", sample, velocity),
        prev_sample=latents("prev_sample", prev_sample, velocity),
        log_prob=log_prob.data_ptr(),
    )
    return log_prob


def affine_backward(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    beta: Tensor | None = None,
    ref_velocity: Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``alpha*(prev - a*x - b*v) + beta*(v - v_ref)`` per row, by the chain rule of the guidance.

    ``alpha`` and ``beta`` are ``[B]`` float32, both times ``grad`` (float32, 0-d or ``[B]``; None
    for 1). A term whose weight is 0 in a row is left out there, whatever its tensors hold. Returns
    the gradients of ``velocity`` and ``velocity_uncond`` (None without), in their dtypes.
    """
    core = require_core()
    policy = _policy(velocity, velocity_uncond, guidance_scale)
    rows = policy["rows"]
    if beta is not None and ref_velocity is None:
        raise ValueError("ref_velocity: expected a tensor when beta is given, got None")
    by_velocity = _host_memory.empty(velocity.shape, velocity.dtype)
    by_uncond = None
    if velocity_uncond is not None:
        by_uncond = _host_memory.empty(velocity_uncond.shape, velocity_uncond.dtype)
    core.affine_backward(
        **policy,
        **_row_scalars(rows, a=a, b=b, grad=_ONE if grad is None else grad),
        sample=latents("sample", sample, velocity),
        prev_sample=latents("prev_sample", prev_sample, velocity),
        ref_velocity=latents("ref_velocity", ref_velocity, velocity),
        alpha=array("alpha", alpha, torch.float32, (rows,)),
        beta=array("beta", beta, torch.float32, (rows,)),
        grad_velocity=latents("grad_velocity", by_velocity, velocity),
        grad_velocity_uncond=latents("grad_velocity_uncond", by_uncond, velocity),
    )
    return by_velocity, by_uncond


class NativeGRPOLoss(NamedTuple):
    """What :func:`grpo_loss` returns, float32."""

    loss: Tensor  # []
    stats: Tensor  # [3]: policy_loss, kl, clip_fraction
    log_prob: Tensor  # [B]
    ratio: Tensor  # [B]
    alpha: Tensor  # [B] for affine_backward, for d loss = 1
    beta: Tensor  # [B]


def grpo_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    offset: Tensor,
    kl_weight: Tensor,
    clip_low: float,
    clip_high: float,
    adv_clip: float = 5.0,
    gate: Tensor | None = None,
    ref_velocity: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_reduction: str = "gated",
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> NativeGRPOLoss:
    """The GRPO loss with gated KL in one pass; the ratio is clamped to ``[clip_low, clip_high]``.

    ``old_log_prob`` and ``advantage`` are ``[B]`` float32, ``gate`` ``[B]`` bool (None: all rows),
    ``kl_weight`` the field ``kl`` of the coefficients. Rows outside the gate do not read
    ``ref_velocity``. Backward: :func:`affine_backward` with ``alpha`` and ``beta`` times the
    gradient of the loss.
    """
    core = require_core()
    policy = _policy(velocity, velocity_uncond, guidance_scale)
    rows = policy["rows"]
    result = NativeGRPOLoss(float32(), float32(3), *(float32(rows) for _ in range(4)))
    policy_loss, kl, clip_fraction = _addresses(result.stats)
    core.grpo_loss(
        **policy,
        **_row_scalars(rows, a=a, b=b, scale=scale, offset=offset, kl_weight=kl_weight),
        sample=latents("sample", sample, velocity),
        prev_sample=latents("prev_sample", prev_sample, velocity),
        ref_velocity=latents("ref_velocity", ref_velocity, velocity),
        old_log_prob=array("old_log_prob", old_log_prob, torch.float32, (rows,)),
        advantage=array("advantage", advantage, torch.float32, (rows,)),
        gate=array("gate", gate, torch.bool, (rows,)),
        clip_low=clip_low,
        clip_high=clip_high,
        adv_clip=adv_clip,
        kl_coef=kl_coef,
        kl_reduction=choice("kl_reduction", kl_reduction, KL_REDUCTIONS),
        loss=result.loss.data_ptr(),
        policy_loss=policy_loss,
        kl=kl,
        clip_fraction=clip_fraction,
        log_prob=result.log_prob.data_ptr(),
        ratio=result.ratio.data_ptr(),
        alpha=result.alpha.data_ptr(),
        beta=result.beta.data_ptr(),
    )
    return result


class NativeNFTLoss(NamedTuple):
    """What :func:`nft_loss` returns, float32."""

    loss: Tensor  # []
    stats: Tensor  # [2]: policy_loss, kl
    weights: Tensor  # [3, B]: grad_positive, grad_negative, grad_kl for nft_backward, d loss = 1


def _nft_tensors(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    beta: float,
    ref_velocity: Tensor | None,
) -> dict[str, Any]:
    size = extent(velocity)
    return {
        **size,
        "velocity": latents("velocity", velocity, velocity),
        "old_velocity": latents("old_velocity", old_velocity, velocity),
        "x0": latents("x0", x0, velocity),
        "xt": latents("xt", xt, velocity),
        "ref_velocity": latents("ref_velocity", ref_velocity, velocity),
        "t": row_scalar("t", t, size["rows"]),
        "beta": beta,
    }


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    advantage: Tensor,
    beta: float = 1.0,
    adv_clip: float = 5.0,
    gate: Tensor | None = None,
    ref_velocity: Tensor | None = None,
    kl_coef: float = 0.0,
) -> NativeNFTLoss:
    """The DiffusionNFT loss with gated KL in one pass over the latents.

    ``t`` is float32, 0-d or ``[B]``; ``advantage`` ``[B]`` float32; ``gate`` ``[B]`` bool (None:
    all rows; no gated row gives KL 0). Backward: :func:`nft_backward` with the three
    gradients times the gradient of the loss.
    """
    core = require_core()
    rows = extent(velocity)["rows"]
    result = NativeNFTLoss(float32(), float32(2), float32(3, rows))
    policy_loss, kl = _addresses(result.stats)
    positive, negative, by_kl = _addresses(result.weights)
    core.nft_loss(
        **_nft_tensors(velocity, old_velocity, x0, xt, t, beta, ref_velocity),
        advantage=array("advantage", advantage, torch.float32, (rows,)),
        gate=array("gate", gate, torch.bool, (rows,)),
        adv_clip=adv_clip,
        kl_coef=kl_coef,
        loss=result.loss.data_ptr(),
        policy_loss=policy_loss,
        kl=kl,
        grad_positive=positive,
        grad_negative=negative,
        grad_kl=by_kl,
    )
    return result


def nft_backward(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    beta: float,
    grad_positive: Tensor,
    grad_negative: Tensor,
    grad_kl: Tensor,
    ref_velocity: Tensor | None = None,
) -> Tensor:
    """``grad_positive*e+ + grad_negative*e- + grad_kl*(v - v_ref)`` per row, velocity's dtype."""
    core = require_core()
    rows = extent(velocity)["rows"]
    grad = _host_memory.empty(velocity.shape, velocity.dtype)
    core.nft_backward(
        **_nft_tensors(velocity, old_velocity, x0, xt, t, beta, ref_velocity),
        grad_positive=array("grad_positive", grad_positive, torch.float32, (rows,)),
        grad_negative=array("grad_negative", grad_negative, torch.float32, (rows,)),
        grad_kl=array("grad_kl", grad_kl, torch.float32, (rows,)),
        grad_velocity=latents("grad_velocity", grad, velocity),
    )
    return grad
