"""Which samples carry the KL penalty: those whose proxy reward is uncertain."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gardo_kernels import backends, checks
from gardo_kernels.adaptive import AdaptiveFraction
from gardo_kernels.operators import operator
from gardo_kernels.ops.gate_samples import native

__all__ = ["GatedSamples", "gate_samples"]


class GatedSamples(NamedTuple):
    """Result of :func:`gate_samples`."""

    uncertainty: Tensor
    gate: Tensor
    threshold: Tensor
    mean_uncertainty: Tensor


#: Backends by name, best first: the files of this folder.
BACKENDS = backends.discover(__name__, __path__)


def _outputs(proxy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, share_of, scope = rest
    threshold = proxy.new_empty(native.threshold_shape(proxy.shape[0], share_of, scope))
    mask = torch.empty_like(proxy, dtype=torch.bool)
    return torch.empty_like(proxy), mask, threshold, proxy.new_empty(())


_gate_samples = operator(native.gate_samples, _outputs)


def gate_samples(
    proxy: Tensor,
    aux: Tensor,
    group_ids: Tensor,
    fraction: float | Tensor | AdaptiveFraction,
    side: str = "over",
    ties: str = "half",
    share_of: str = "all",
    scope: str = "batch",
    backend: str | None = None,
) -> GatedSamples:
    """Gate the samples that the proxy rates otherwise than the auxiliaries (arXiv 2512.24138)::

        U_i  = w_i(proxy) - mean_k w_i(aux_k)        w: the win rate, see `win_rate`
        gate = U > the (1 - fraction) quantile of U  by linear interpolation

    Args:
        proxy: ``[N]`` floating, the reward being optimised.
        aux: ``[K, N]`` floating, auxiliary rewards; K may be 0 (then no sample is uncertain).
        group_ids: int64 ``[N]`` in any order, one id per prompt; read with ``scope="group"``.
        fraction: the share to gate, in ``[0, 1]``; a number, or a 0-d floating tensor (whose value
            is not checked on an accelerator, and read there by the kernel). An `AdaptiveFraction`
            is updated first, which waits for an accelerator: by its rule ``official`` with the
            mean of the U ``>= 0``, by ``paper`` with that of all (0 but with ``ties="strict"``).
        side: ``over``: samples that the proxy over-rates are uncertain; ``under``: those that it
            under-rates (U has the other sign), which is what published code gates.
        ties: ``half``: equal rewards count one half, U is in ``[-1, 1]``; ``ordinal``: U is the
            difference of ordinal ranks, equal rewards ranking in the order of the samples, which
            published code does; ``strict``: w is the paper's share of wins,
            ``#{j: R_j < R_i} / B`` with B the number of valid samples compared, itself included.
        share_of: what ``fraction`` is a share of. ``all``: the quantile is that of all U (the
            paper's); ``nonnegative``: of those ``>= 0``, alone (published code's).
        scope: ``batch`` compares a sample with all others, ``group`` with its group. The quantile
            is that of the batch; but with ``group`` and ``all`` each group has its own, as in the
            paper's algorithm 1.
        backend: None for the best available, or a name.

    Returns:
        ``uncertainty`` ``[N]``, ``gate`` bool ``[N]``, ``threshold`` (the quantile) 0-d, or ``[N]``
        where each group has its own, and 0-d ``mean_uncertainty`` over the samples that the
        quantile is taken of. With ``all`` that mean is 0, as the scores of every reward have the
        same mean, unless ``ties`` is ``strict`` and some rewards are equal.
        With an `AdaptiveFraction` it is the mean that this was updated with.
        Computed in float64; float64 for a float64 proxy, else float32. No gradient flows.

        A sample with a reward that is not finite takes no part: uncertainty 0, not gated, left out
        of every mean and ranking (its group threshold reads 0). Without any valid sample
        ``threshold`` and ``mean_uncertainty`` are 0.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device or value.
        BackendUnavailable: the backend asked for cannot run here.
    """
    checks.rewards("proxy", proxy, 1)
    checks.rewards("aux", aux, 2, proxy)
    checks.group_ids(group_ids, proxy.shape[0], proxy.device)
    adaptive = fraction if isinstance(fraction, AdaptiveFraction) else None
    number, tensor = _fraction(fraction if adaptive is None else adaptive.fraction, proxy.device)
    checks.choice("side", side, native.SIDES)
    checks.choice("ties", ties, native.TIES)
    checks.choice("share_of", share_of, native.SHARES)
    checks.choice("scope", scope, native.SCOPES)
    chosen = backends.select("gate_samples", backend, proxy.device, proxy.dtype, BACKENDS)
    wide = (proxy.to(torch.float64), aux.to(torch.float64), group_ids)
    rule = (side, ties, share_of, scope)
    found = _gate_samples(chosen, *wide, number, tensor, *rule)
    if adaptive is not None:
        uncertainty, *_, mean = found
        if adaptive.rule == "paper" and share_of != "all":
            *_, mean = _gate_samples(chosen, *wide, number, None, side, ties, "all", scope)
        elif adaptive.rule == "official" and share_of == "all":
            kept = (uncertainty >= 0) & proxy.isfinite() & aux.isfinite().all(0)
            mean = torch.where(kept, uncertainty, 0.0).sum() / kept.sum().clamp(min=1)
        if adaptive.update(mean) != number:
            found = _gate_samples(chosen, *wide, adaptive.fraction, None, *rule)
        found = (*found[:3], mean)
    if proxy.dtype == torch.float64:
        return GatedSamples(*found)
    uncertainty, gate, *others = found
    return GatedSamples(
        uncertainty.to(torch.float32), gate, *(value.to(torch.float32) for value in others)
    )


def _fraction(fraction: Any, device: torch.device) -> tuple[float, Tensor | None]:
    """As a number where the host knows it, else as a 0-d tensor."""
    if not isinstance(fraction, Tensor):
        return checks.number("fraction", fraction, low=0.0, high=1.0), None
    checks.floating("fraction", fraction)
    if fraction.numel() != 1:
        raise ValueError(f"fraction: expected one value, got shape {list(fraction.shape)}")
    fraction = fraction.detach().reshape(())
    if fraction.device.type == "cpu":
        return checks.number("fraction", fraction.item(), low=0.0, high=1.0), None
    return 0.0, checks.same_device("fraction", fraction, device)
