"""Rewards of one epoch to advantages, uncertainties and the gate, in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gardo_kernels import backends, checks
from gardo_kernels.operators import operator
from gardo_kernels.ops.shape_rewards import native

__all__ = ["ShapedRewards", "shape_rewards"]


class ShapedRewards(NamedTuple):
    """Result of :func:`shape_rewards`."""

    advantage: Tensor
    uncertainty: Tensor
    gate: Tensor
    threshold: Tensor
    mean_uncertainty: Tensor


#: Backends by name, best first: the files of this folder.
BACKENDS = backends.discover(__name__, __path__)


def _outputs(proxy: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows, mask = (
        (torch.empty_like(proxy) for _ in range(2)),
        torch.empty_like(proxy, dtype=torch.bool),
    )
    return (*rows, mask, proxy.new_empty(()), proxy.new_empty(()))


_shape_rewards = operator(native.shape_rewards, _outputs)


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
    _check_rewards(proxy, aux, group_ids, distance)
    fraction = _check_fraction(fraction)
    checks.choice("advantage_norm", advantage_norm, native.ADVANTAGE_NORMS)
    checks.choice("gate", gate, native.GATES)
    checks.choice("scope", scope, native.SCOPES)
    chosen = backends.select("shape_rewards", backend, proxy.device, proxy.dtype, BACKENDS)

    given = (proxy, aux) if distance is None else (proxy, aux, distance)
    # The native kernel of the CPU reads and writes float32 itself.
    itself = chosen == "native" and proxy.is_cpu and all(v.dtype == torch.float32 for v in given)
    proxy_in, aux_in, *distance_in = (
        value if itself else value.to(torch.float64) for value in given
    )
    number, tensor = (0.0, fraction) if isinstance(fraction, Tensor) else (fraction, None)
    shaped = ShapedRewards(
        *_shape_rewards(
            chosen,
            proxy_in,
            aux_in,
            group_ids,
            distance_in[0] if distance_in else None,
            number,
            tensor,
            advantage_norm,
            gate,
            scope,
        )
    )
    if itself or proxy.dtype == torch.float64:
        return shaped
    return ShapedRewards(
        *(value if value.dtype == torch.bool else value.to(torch.float32) for value in shaped)
    )


def _check_rewards(proxy: Any, aux: Any, group_ids: Any, distance: Any) -> None:
    checks.floating("proxy", proxy)
    if proxy.dim() != 1:
        raise ValueError(f"proxy: expected shape [N], got {list(proxy.shape)}")
    count, device = proxy.shape[0], proxy.device
    checks.floating("aux", aux)
    if aux.dim() != 2 or aux.shape[1] != count:
        raise ValueError(f"aux: expected shape [K, {count}], got {list(aux.shape)}")
    checks.same_device("aux", aux, device)
    checks.group_ids(group_ids, count, device)
    if distance is not None:
        checks.per_sample("distance", distance, count, device)


def _check_fraction(fraction: Any) -> float | Tensor:
    if not isinstance(fraction, Tensor):
        return checks.number("fraction", fraction, low=0.0, high=1.0)
    checks.floating("fraction", fraction)
    if fraction.numel() != 1:
        raise ValueError(f"fraction: expected one value, got shape {list(fraction.shape)}")
    fraction = fraction.detach().reshape(())
    if fraction.device.type == "cpu":
        return checks.number("fraction", fraction.item(), low=0.0, high=1.0)
    return fraction
