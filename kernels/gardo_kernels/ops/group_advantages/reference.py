"""Plain PyTorch form of the group advantages: the oracle. Everything is float64."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels.groups import group

_STD_EPS = 1e-4


def group_advantages(
    proxy: Tensor, group_ids: Tensor, distance: Tensor | None, norm: str, diversity_scale: str
) -> Tensor:
    """``[N]``; a sample with a value that is not finite takes no part and has 0."""
    valid = proxy.isfinite()
    if distance is not None:
        valid &= distance.isfinite()
    groups = group(group_ids)
    centred = proxy - groups.mean(proxy, valid)
    advantage = centred
    if norm == "group_std":
        advantage = centred / (groups.mean(centred.square(), valid).sqrt() + _STD_EPS)
    elif norm == "global_std":
        count = valid.sum().clamp(min=1)
        mean = torch.where(valid, proxy, 0.0).sum() / count
        variance = torch.where(valid, (proxy - mean).square(), 0.0).sum() / count
        advantage = centred / (variance.sqrt() + _STD_EPS)
    if distance is not None:
        factor = distance
        if diversity_scale == "group_mean":
            mean_distance = groups.mean(distance, valid)
            # Identical images (mean distance 0) say nothing about diversity: factor 1.
            factor = torch.where(mean_distance > 0, distance / mean_distance, 1.0)
        advantage = advantage * torch.where(advantage >= 0, factor, 1.0)
    return torch.where(valid, advantage, 0.0)
