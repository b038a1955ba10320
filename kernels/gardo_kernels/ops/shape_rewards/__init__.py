"""Rewards of one epoch to advantages, uncertainties and the gate, in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gardo_kernels import checks
from gardo_kernels.ops import gate_samples as gating
from gardo_kernels.ops import group_advantages as advantages
from gardo_kernels.ops.group_advantages.native import NORMS

__all__ = ["ShapedRewards", "shape_rewards"]

#: The rule of each gate; ``all`` and ``off`` keep the uncertainties of ``paper``.
_RULES = {
    "paper": {"side": "over", "ties": "half"},
    "official": {"side": "under", "ties": "ordinal"},
    "all": {"side": "over", "ties": "half"},
    "off": {"side": "over", "ties": "half"},
}


class ShapedRewards(NamedTuple):
    """Result of :func:`shape_rewards`."""

    advantage: Tensor
    uncertainty: Tensor
    gate: Tensor
    threshold: Tensor
    mean_uncertainty: Tensor


def shape_rewards(
    proxy: Tensor,
    aux: Tensor,
    group_ids: Tensor,
    distance: Tensor | None = None,
    fraction: float | Tensor = 0.1,
    advantage_norm: str = "none",
    gate: str = "paper",
    scope: str = "batch",
    backend: str | None = None,
) -> ShapedRewards:
    """Advantages, uncertainties and gate of the N samples of one epoch.

    The composition of :func:`group_advantages` and :func:`gate_samples`, for samples that have all
    their values.

    Args:
        proxy: ``[N]`` floating, the reward being optimised.
        aux: ``[K, N]`` floating, auxiliary rewards; K may be 0 (then no sample is uncertain).
        group_ids: int64 ``[N]`` in any order, one id per prompt.
        distance: ``[N]`` floating, cosine distance to the nearest neighbour of the group; None
            leaves the advantages without a diversity factor.
        fraction: share of the samples with non-negative uncertainty to gate, in ``[0, 1]``; a
            number, or a 0-d floating tensor (whose value is not checked on an accelerator).
        advantage_norm: ``none``: reward minus group mean; ``group_std``, ``global_std``: divided
            by the (population) standard deviation + 1e-4.
        gate: ``paper``: samples that the proxy over-rates, U = proxy win rate minus mean auxiliary
            win rate, strictly above the ``1 - fraction`` quantile of the non-negative U;
            ``official``: the same rule on U = descending ordinal rank by the proxy minus mean rank
            by the auxiliaries, in ranks, as published code has it (it gates what the proxy
            under-rates); ``all``; ``off``.
        scope: ``batch`` ranks a sample against all others, ``group`` against its group. The
            quantile is over the batch in both.
        backend: None for the best available, ``native`` or ``reference``.

    Returns:
        ``advantage`` and ``uncertainty`` ``[N]``, ``gate`` bool ``[N]``, 0-d ``threshold`` (the
        quantile) and ``mean_uncertainty`` (of the non-negative U, which drives the adaptive
        fraction). Computed in float64; returned in float64 for a float64 proxy, else float32.

        A sample with a non-finite proxy, auxiliary or distance takes no part: advantage 0,
        uncertainty 0, not gated, and left out of every mean and ranking. Positive advantages are
        multiplied by distance / mean distance of the group, or by 1 where that mean is 0. Without
        any valid sample ``threshold`` and ``mean_uncertainty`` are 0.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device or value.
        BackendUnavailable: the backend asked for cannot run here.
    """
    checks.choice("advantage_norm", advantage_norm, NORMS)
    checks.choice("gate", gate, tuple(_RULES))
    checks.rewards("proxy", proxy, 1)
    checks.rewards("aux", aux, 2, proxy)
    valid = proxy.isfinite() & aux.isfinite().all(0)
    if distance is not None:
        checks.per_sample("distance", distance, proxy.shape[0], proxy.device)
        valid &= distance.isfinite()
    known = torch.where(valid, proxy, torch.nan)
    gated = gating.gate_samples(
        known, aux, group_ids, fraction, **_RULES[gate], share_of="nonnegative", scope=scope,
        backend=backend,
    )  # fmt: skip
    advantage = advantages.group_advantages(
        known, group_ids, distance, advantage_norm, backend=backend
    )
    mask = {"all": valid, "off": torch.zeros_like(valid)}.get(gate, gated.gate)
    return ShapedRewards(advantage, gated.uncertainty, mask, *gated[2:])
