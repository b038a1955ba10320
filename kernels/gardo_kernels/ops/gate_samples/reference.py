"""Plain PyTorch form of uncertainty and gate: the oracle. Everything is float64."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels.groups import group
from gardo_kernels.ops.win_rate.reference import doubled_wins


def gate_samples(
    proxy: Tensor,
    aux: Tensor,
    group_ids: Tensor,
    fraction: float,
    fraction_tensor: Tensor | None,
    side: str,
    ties: str,
    share_of: str,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``uncertainty, gate, threshold, mean_uncertainty``.

    Samples with a value that is not finite take no part: uncertainty 0, not gated.
    """
    valid = proxy.isfinite() & aux.isfinite().all(0)
    ids = group_ids if scope == "group" else None
    gap, unit = _gaps(proxy, aux, ids, valid, side == "under", ties)
    uncertainty = gap.to(torch.float64) / unit.to(torch.float64)
    eligible = valid if share_of == "all" else valid & (uncertainty >= 0)
    share = fraction if fraction_tensor is None else fraction_tensor.to(torch.float64)
    if share_of == "all" and ids is not None:
        threshold = torch.where(valid, _group_quantile(uncertainty, ids, eligible, 1 - share), 0.0)
    else:
        threshold = _quantile(uncertainty, eligible, 1 - share)
    total = proxy.new_zeros(())
    if share_of != "all":
        total = torch.where(eligible, uncertainty, 0.0).sum()
    elif ties == "strict":  # else 0: ranks of every reward have the same mean
        total = _total(gap, unit, ids)
    mean = total / eligible.sum().clamp(min=1)
    return uncertainty, valid & (uncertainty > threshold), threshold, mean


def _gaps(
    proxy: Tensor, aux: Tensor, ids: Tensor | None, valid: Tensor, under: bool, ties: str
) -> tuple[Tensor, Tensor]:
    """Win rate, or rank, by the proxy minus the mean over the auxiliaries: int64 over int64.

    In integers up to the division: agreement is exactly 0 and equal gaps compare equal.
    """
    num_aux, one = aux.shape[0], torch.ones_like(proxy, dtype=torch.int64)
    if num_aux == 0:
        return torch.zeros_like(one), one
    rewards = torch.cat([proxy[None], aux]).masked_fill(~valid, torch.nan)
    if under:
        rewards = -rewards
    if ties == "ordinal":
        score, unit = _ranks(rewards, ids), one
    else:
        tie = int(ties == "half")
        score, count = doubled_wins(rewards, ids, tie)
        unit = (2 * (count[0] - tie)).clamp(min=1)
    gap = num_aux * score[0] - score[1:].sum(0)
    return torch.where(valid, gap, 0), num_aux * unit


def _total(gap: Tensor, unit: Tensor, ids: Tensor | None) -> Tensor:
    """Sum of ``gap / unit``, of integers within a scope, lest rounding pass for a trend."""
    if ids is None:
        return gap.sum().to(torch.float64) / unit.amax() if gap.numel() else gap.sum().double()
    groups = group(ids)
    # all members of a group have its unit, and its first one stands for it
    sums = groups.sum(gap.to(torch.float64)) / unit
    return (sums / groups.sum(torch.ones_like(sums))).sum()


def _ranks(rewards: Tensor, ids: Tensor | None) -> Tensor:
    """Ordinal ranks ``[K, N]``, 1 = lowest of its group; equal rewards rank in sample order."""
    order = torch.argsort(rewards.nan_to_num(nan=torch.inf), dim=-1, stable=True)
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


def _quantile(values: Tensor, eligible: Tensor, q: float | Tensor) -> Tensor:
    """The ``q`` quantile, by linear interpolation, of the eligible values; 0 if there is none."""
    zero = torch.zeros((), dtype=torch.float64, device=values.device)
    if values.numel() == 0:
        return zero
    count = eligible.sum()
    ordered = torch.where(eligible, values, torch.inf).sort().values
    return torch.where(count > 0, _interpolated(ordered, zero.to(torch.int64), count, q), zero)


def _group_quantile(values: Tensor, ids: Tensor, eligible: Tensor, q: float | Tensor) -> Tensor:
    """The same within the group of each sample, ``[N]``."""
    groups = group(ids)
    # By value and then, stably, by group: the eligible ones come first in each group.
    by_value = torch.where(eligible, values, torch.inf).argsort(stable=True)
    by_group = by_value[groups.member[by_value].argsort(stable=True)]
    ordered = torch.where(eligible, values, torch.inf)[by_group]
    start = (groups.sizes.cumsum(0) - groups.sizes)[groups.member]
    count = groups.sum(eligible.to(torch.float64)).to(torch.int64)
    return torch.where(count > 0, _interpolated(ordered, start, count, q), 0.0)


def _interpolated(ordered: Tensor, start: Tensor, count: Tensor, q: float | Tensor) -> Tensor:
    """The ``q`` quantile of ``ordered[start : start + count]``."""
    last = (count - 1).clamp(min=0)
    position = q * last.to(torch.float64)
    lower = position.floor().to(torch.int64)
    upper = torch.minimum(lower + 1, last)
    # Indexing by a 0-d tensor would read it on the host.
    around = torch.stack([start + lower, start + upper])
    low, high = ordered.gather(0, around.flatten()).view_as(around)
    return torch.lerp(low, high, position - lower)
