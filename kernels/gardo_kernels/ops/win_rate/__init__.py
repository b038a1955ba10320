"""Tie-aware win rates."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels import backends, checks
from gardo_kernels.operators import operator
from gardo_kernels.ops.win_rate import native

__all__ = ["win_rate"]

#: Backends by name, best first: the files of this folder.
BACKENDS = backends.discover(__name__, __path__)

_win_rate = operator(native.win_rate, lambda rewards, _: torch.empty_like(rewards))


def win_rate(
    rewards: Tensor, group_ids: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Share of the other samples that a sample beats, a tie counting one half::

        w_i = (#{j: R_j < R_i} + 0.5 * #{j != i: R_j = R_i}) / (N - 1)

    Args:
        rewards: ``[K, N]`` floating, one row per reward.
        group_ids: int64 ``[N]``; samples are compared within their group. None: with all others.

        backend: None for the best available, ``native`` or ``reference``.

    Returns:
        ``[K, N]`` in ``[0, 1]``, float64 for float64 rewards, else float32. A sample without
        others has 0.5. NaN rewards stay NaN and are no one's rival. No gradient flows.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device.
        BackendUnavailable: the backend asked for cannot run here.
    """
    checks.floating("rewards", rewards)
    if rewards.dim() != 2:
        raise ValueError(f"rewards: expected shape [K, N], got {list(rewards.shape)}")
    if group_ids is not None:
        checks.group_ids(group_ids, rewards.shape[1], rewards.device)
    chosen = backends.select("win_rate", backend, rewards.device, rewards.dtype, BACKENDS)
    rate: Tensor = _win_rate(chosen, rewards.to(torch.float64), group_ids)
    return rate.to(checks.compute_dtype(rewards))
