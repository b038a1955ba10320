"""Plain PyTorch form of advantages, uncertainty and gate: the oracle. Everything is float64."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels.groups import group
from gardo_kernels.ops.win_rate.reference import doubled_wins

_STD_EPS = 1e-4


def shape_rewards(
    proxy: Tensor,
    aux: Tensor,
    group_ids: Tensor,
    distance: Tensor | None,
    fraction: float,
    fraction_tensor: Tensor | None,
    advantage_norm: str,
    gate: str,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``advantage, uncertainty, gate, threshold, mean_uncertainty``.

    Samples with a value that is not finite take no part: advantage 0, uncertainty 0, not gated.
    """
    valid = proxy.isfinite() & aux.isfinite().all(0)
    if distance is not None:
        valid &= distance.isfinite()
    advantage = _advantage(proxy, group_ids, distance, valid, advantage_norm)
    ids = group_ids if scope == "group" else None
    uncertainty = _uncertainty(proxy, aux, ids, valid, official=gate == "official")
    threshold, mean = _threshold(
        uncertainty, valid, fraction if fraction_tensor is None else fraction_tensor.double()
    )
    if gate == "all":
        gated = valid
    elif gate == "off":
        gated = torch.zeros_like(valid)
    else:
        gated = valid & (uncertainty > threshold)
    return advantage, uncertainty, gated, threshold, mean


def _advantage(
    proxy: Tensor, group_ids: Tensor, distance: Tensor | None, valid: Tensor, norm: str
) -> Tensor:
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
        mean_distance = groups.mean(distance, valid)
        # Identical images (mean distance 0) say nothing about diversity: factor 1.
        factor = torch.where(mean_distance > 0, distance / mean_distance, 1.0)
        advantage = advantage * torch.where(advantage >= 0, factor, 1.0)
    return torch.where(valid, advantage, 0.0)


def _uncertainty(
    proxy: Tensor, aux: Tensor, ids: Tensor | None, valid: Tensor, official: bool
) -> Tensor:
    """Win rate of the proxy minus the mean over the auxiliaries, or the official rank gap."""
    num_aux = aux.shape[0]
    if num_aux == 0:
        return torch.zeros_like(proxy)
    rewards = torch.cat([proxy[None], aux]).masked_fill(~valid, torch.nan)
    if official:
        score, unit = _descending_ranks(rewards, ids), torch.ones_like(proxy, dtype=torch.int64)
    else:
        score, count = doubled_wins(rewards, ids)
        unit = (2 * (count[0] - 1)).clamp(min=1)
    # In integers up to the division: agreement is exactly 0 and equal gaps compare equal.
    gap = num_aux * score[0] - score[1:].sum(0)
    uncertainty = gap.to(torch.float64) / (num_aux * unit).to(torch.float64)
    return torch.where(valid, uncertainty, 0.0)


def _descending_ranks(rewards: Tensor, ids: Tensor | None) -> Tensor:
    """Ordinal ranks ``[K, N]``, 1 = best of its group; equal rewards rank in sample order."""
    order = torch.argsort(rewards.nan_to_num(nan=-torch.inf), dim=-1, descending=True, stable=True)
    position = torch.arange(rewards.shape[-1], device=rewards.device).expand_as(order)
    start = torch.zeros_like(position)
    if ids is not None:
        group, regroup = torch.sort(ids.expand_as(rewards).gather(-1, order), dim=-1, stable=True)
        order = order.gather(-1, regroup)
        first = torch.nn.functional.pad(group[:, 1:] != group[:, :-1], (1, 0), value=True)
        first = first[:, : position.shape[1]]
        if position.shape[1]:
            start = torch.where(first, position, 0).cummax(-1).values
    return torch.empty_like(order).scatter_(-1, order, position - start + 1)


def _threshold(
    uncertainty: Tensor, valid: Tensor, fraction: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The ``1 - fraction`` quantile and the mean of the non-negative uncertainties; 0 if none."""
    zero = torch.zeros((), dtype=torch.float64, device=uncertainty.device)
    if uncertainty.numel() == 0:
        return zero, zero.clone()
    eligible = valid & (uncertainty >= 0)
    count = eligible.sum()
    ordered = torch.where(eligible, uncertainty, torch.inf).sort().values
    last = (count - 1).clamp(min=0)
    position = (1 - fraction) * last.to(torch.float64)
    lower = position.floor().to(torch.int64)
    upper = torch.minimum(lower + 1, last)
    # Indexing by a 0-d tensor would read it on the host.
    around = ordered.gather(0, torch.stack([lower, upper]))
    quantile = torch.lerp(around[0], around[1], position - lower)
    mean = torch.where(eligible, uncertainty, 0.0).sum() / count.clamp(min=1)
    return torch.where(count > 0, quantile, zero), mean
