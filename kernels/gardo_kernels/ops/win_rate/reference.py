"""Plain PyTorch form of tie-aware win counts, O(K N log N) by sorting: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def doubled_wins(rewards: Tensor, ids: Tensor | None, tie: int = 1) -> tuple[Tensor, Tensor]:
    """Twice the wins of each sample, and the number of samples it was compared within.

    ``rewards`` is ``[K, N]`` float64, ``ids`` ``[N]`` (None: one group). A win counts 2, a tie
    ``tie``, so the result is an exact integer; NaN takes no part (its own entry is meaningless).
    Both results are int64 ``[K, N]``.
    """
    # Sorting by value and then, stably, by group leaves NaN at the end of each group.
    values, order = torch.sort(rewards, dim=-1, stable=True)
    if ids is None:
        group = torch.zeros_like(order)
    else:
        group, regroup = torch.sort(ids.expand_as(rewards).gather(-1, order), dim=-1, stable=True)
        values, order = values.gather(-1, regroup), order.gather(-1, regroup)
    group_edge = group[:, 1:] != group[:, :-1]
    run_edge = group_edge | (values[:, 1:] != values[:, :-1])
    group_start, group_end = _runs(group_edge, group)
    run_start, run_end = _runs(run_edge, group)
    missing = torch.isnan(values).to(torch.int64).cumsum(-1)
    before = torch.nn.functional.pad(missing, (1, 0))
    count = group_end - group_start
    count = count - (before.gather(-1, group_end) - before.gather(-1, group_start))
    wins = 2 * (run_start - group_start) + tie * (run_end - run_start - 1)
    return _unsort(wins, order), _unsort(count, order)


def win_rate(rewards: Tensor, group_ids: Tensor | None) -> Tensor:
    """Share of the others that each sample of float64 ``[K, N]`` beats; NaN stays NaN."""
    wins, count = doubled_wins(rewards, group_ids)
    rate = wins.to(torch.float64) / (2 * (count - 1)).clamp(min=1).to(torch.float64)
    rate = torch.where(count > 1, rate, torch.full_like(rate, 0.5))
    return torch.where(torch.isnan(rewards), rewards, rate)


def _runs(edge: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end (exclusive) of the run around each position; ``edge`` parts neighbours."""
    n = like.shape[-1]
    position = torch.arange(n, device=like.device).expand_as(like)
    first = torch.nn.functional.pad(edge, (1, 0), value=True)[..., :n]
    last = torch.nn.functional.pad(edge, (0, 1), value=True)[..., :n]
    start = torch.where(first, position, torch.zeros_like(position))
    end = torch.where(last, position + 1, torch.full_like(position, n))
    if n == 0:
        return start, end
    start = start.cummax(-1).values
    end = end.flip(-1).cummin(-1).values.flip(-1)
    return start, end


def _unsort(values: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(values).scatter_(-1, order, values)
