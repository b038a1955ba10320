"""Plain PyTorch form of the DiffusionNFT loss: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels.ops.grpo_loss.reference import gated_mean_square
from gardo_kernels.ops.sde.reference import row_coefficient
from gardo_kernels.row_sums import row_mean

_WEIGHT_FLOOR = 1e-5


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
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss, policy_loss, kl``."""
    v = velocity.to(dtype)
    v_old = old_velocity.detach().to(dtype)
    clean, noisy = x0.detach().to(dtype), xt.detach().to(dtype)
    time = row_coefficient(t.detach(), v)
    preference = (advantage.detach().to(dtype) / (2 * adv_clip) + 0.5).clamp(0, 1)
    positive = beta * v + (1 - beta) * v_old
    negative = (1 + beta) * v_old - beta * v
    l_positive = _self_normalised_error(noisy - time * positive, clean)
    l_negative = _self_normalised_error(noisy - time * negative, clean)
    per_row = adv_clip * (preference * l_positive + (1 - preference) * l_negative) / beta
    mean = reduction == "mean"
    policy_loss = per_row.sum() / (max(per_row.shape[0], 1) if mean else 1)
    if ref_velocity is None:
        kl = torch.zeros_like(policy_loss)
    else:
        kl = gated_mean_square(v, ref_velocity.detach().to(dtype), gate, "gated" if mean else "sum")
    return policy_loss + kl_coef * kl, policy_loss, kl


def _self_normalised_error(prediction: Tensor, target: Tensor) -> Tensor:
    """``mean((prediction - target)^2) / w`` per row; ``w`` = mean absolute error, a constant."""
    error = prediction - target
    weight = row_mean(error.detach().abs()).clamp(min=_WEIGHT_FLOOR)
    return row_mean(error.square()) / weight
