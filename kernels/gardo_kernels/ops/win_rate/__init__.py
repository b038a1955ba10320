"""Tie-aware win rates."""

from __future__ import annotations

from torch import Tensor

from gardo_kernels import _checks
from gardo_kernels.ops.win_rate import reference

__all__ = ["win_rate"]


def win_rate(rewards: Tensor, group_ids: Tensor | None = None) -> Tensor:
    """Share of the other samples that a sample beats, a tie counting one half::

        w_i = (#{j: R_j < R_i} + 0.5 * #{j != i: R_j = R_i}) / (N - 1)

    Args:
        rewards: ``[K, N]`` floating, one row per reward.
        group_ids: int64 ``[N]``; samples are compared within their group. None: with all others.

    Returns:
        ``[K, N]`` in ``[0, 1]``, float64 for float64 rewards, else float32. A sample without
        others has 0.5. NaN rewards stay NaN and are no one's rival. No gradient flows.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device.
    """
    _checks.floating("rewards", rewards)
    if rewards.dim() != 2:
        raise ValueError(f"rewards: expected shape [K, N], got {list(rewards.shape)}")
    if group_ids is not None:
        _checks.group_ids(group_ids, rewards.shape[1], rewards.device)
    rate = reference.win_rate(rewards.detach(), group_ids)
    return rate.to(_checks.compute_dtype(rewards))
