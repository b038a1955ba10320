"""Plain PyTorch form of the GRPO loss: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels.ops.sde.coefficients import SDECoefficients
from gardo_kernels.ops.sde.reference import guided, log_prob_of, row_coefficient, transition_mean
from gardo_kernels.row_sums import row_mean


def grpo_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    coef: SDECoefficients,
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
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """``loss, policy_loss, kl, log_prob, ratio, clip_fraction``."""
    uncond = None if velocity_uncond is None else velocity_uncond.to(dtype)
    v = guided(velocity.to(dtype), uncond, guidance_scale)
    mean = transition_mean(v, sample.detach().to(dtype), coef)
    log_prob = log_prob_of(prev_sample.detach().to(dtype), mean, coef)
    if noise is None:
        log_ratio = log_prob - old_log_prob.detach().to(dtype)
    else:
        z = noise.detach().to(dtype)
        old_mean = prev_sample.detach().to(dtype) - row_coefficient(coef.c, z) * z
        log_ratio = row_mean(z * (mean - old_mean))
    policy, ratio, clipped = policy_terms(
        log_ratio, advantage.detach(), 1 - clip_low, 1 + clip_high, adv_clip
    )
    rows = max(policy.shape[0], 1)  # an empty batch has loss 0
    policy_loss = policy.sum() / (1 if reduction == "sum" else rows)
    if ref_velocity is None:
        kl = torch.zeros_like(policy_loss)
    else:
        weight = coef.kl.to(dtype).expand(v.shape[0])
        kl = gated_mean_square(v, ref_velocity.detach().to(dtype), gate, reduction, weight)
    loss = policy_loss + kl_coef * kl
    return loss, policy_loss, kl, log_prob, ratio, clipped.to(dtype).sum() / rows


def policy_terms(
    log_ratio: Tensor, advantage: Tensor, low: float, high: float, adv_clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Per sample: the clipped policy loss, the ratio, and whether the ratio left the clip range."""
    a = advantage.to(log_ratio.dtype).clamp(-adv_clip, adv_clip)
    ratio = torch.exp(log_ratio.detach())
    bound = -a * ratio.clamp(low, high)
    # The maximum is written out so that a row that is clipped, or has no advantage (its reward
    # failed, say), cannot turn an overflowing ratio into 0 * inf in the gradient.
    idle = a == 0
    active = ~idle & (-a * ratio >= bound)
    policy = torch.where(idle, 0.0, bound)
    policy = torch.where(active, -a * torch.exp(torch.where(active, log_ratio, 0.0)), policy)
    return policy, ratio, (ratio < low) | (ratio > high)


def gated_mean_square(
    v: Tensor, ref: Tensor, gate: Tensor | None, reduction: str, weight: Tensor | None = None
) -> Tensor:
    """Mean over gated samples (``gated``), sum over gated / batch size (``batch``), or ``sum``.

    Rows outside the gate are replaced before any arithmetic: whatever ``ref`` holds there, NaN
    included, reaches neither the value nor the gradient. No gated row gives 0.
    """
    batch = v.shape[0]
    if gate is None:
        gate = torch.ones(batch, dtype=torch.bool, device=v.device)
    rows = gate.view(-1, *([1] * (v.dim() - 1)))
    difference = torch.where(rows, v - torch.where(rows, ref, v.detach()), torch.zeros_like(v))
    per_row = row_mean(difference.square())
    if weight is not None:
        per_row = per_row * torch.where(gate, weight, torch.zeros_like(weight))
    if reduction == "sum":
        return per_row.sum()
    if reduction == "batch":
        return per_row.sum() / max(batch, 1)
    return per_row.sum() / gate.sum().clamp(min=1).to(v.dtype)
