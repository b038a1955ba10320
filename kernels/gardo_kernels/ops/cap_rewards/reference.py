"""Plain PyTorch form of the cap on the proxy: the oracle. Everything is float64."""

from __future__ import annotations

import torch
from torch import Tensor


def cap_rewards(
    proxy: Tensor, aux: Tensor, pool: Tensor, tau: float, tau_tensor: Tensor | None
) -> Tensor:
    """``[N]``; the rows of ``pool`` ascend, and what is infinite in them is left out."""
    count = pool[0].isfinite().sum()
    ordered, rewards = pool[1:].contiguous(), aux.contiguous()
    # Twice the number of the pool's that a reward beats: an exact integer.
    wins = torch.searchsorted(ordered, rewards) + torch.searchsorted(ordered, rewards, right=True)
    level = wins.sum(0).to(torch.float64) / (2 * aux.shape[0] * count.clamp(min=1))
    level = level + (tau if tau_tensor is None else tau_tensor)
    known = proxy.isfinite() & aux.isfinite().all(0) & (count > 0) & ~level.isnan()

    last = (count - 1).clamp(min=0)
    position = torch.where(known, level, 0.0).clamp(0, 1) * last
    lower = position.floor().to(torch.int64)
    low, high = (pool[0].gather(0, at) for at in (lower, torch.minimum(lower + 1, last)))
    # Not `lerp`, which may round to a fall where the level rises.
    quantile = torch.minimum(low + (high - low) * (position - lower), high)
    capped = torch.where(level >= 1, proxy, torch.minimum(proxy, quantile))
    return torch.where(known, capped, torch.nan)
