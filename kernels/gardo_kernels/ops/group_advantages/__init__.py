"""Advantages of one epoch: rewards relative to their prompt group, with the diversity factor."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels import backends, checks
from gardo_kernels.operators import operator
from gardo_kernels.ops.group_advantages import native

__all__ = ["group_advantages"]

#: Backends by name, best first: the files of this folder.
BACKENDS = backends.discover(__name__, __path__)

_group_advantages = operator(native.group_advantages, lambda proxy, *_: torch.empty_like(proxy))


def group_advantages(
    proxy: Tensor,
    group_ids: Tensor,
    distance: Tensor | None = None,
    norm: str = "none",
    diversity_scale: str = "group_mean",
    backend: str | None = None,
) -> Tensor:
    """Advantage of each sample within its prompt group (GARDO, arXiv 2512.24138)::

        A_i = r_i - mean_group(r)                   then divided as `norm` says
        A_i = A_i * factor_i  where A_i >= 0        with distances

    Args:
        proxy: ``[N]`` floating, the reward being optimised.
        group_ids: int64 ``[N]`` in any order, one id per prompt.
        distance: ``[N]`` floating, cosine distance to the nearest neighbour of the group
            (``nearest_neighbor_distance``); None leaves the advantages without a factor.
        norm: ``none``; ``group_std`` or ``global_std``: divided by the (population) standard
            deviation + 1e-4.
        diversity_scale: ``group_mean``: the factor is the distance / mean distance of the group,
            or 1 where that mean is 0, as in published code; ``raw``: the distance, as in the paper.
        backend: None for the best available, or a name.

    Returns:
        ``[N]``, computed in float64; float64 for a float64 proxy, else float32. A sample whose
        reward or distance is not finite has 0 and is left out of every mean. No gradient flows.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device or value.
        BackendUnavailable: the backend asked for cannot run here.
    """
    checks.rewards("proxy", proxy, 1)
    checks.group_ids(group_ids, proxy.shape[0], proxy.device)
    if distance is not None:
        checks.per_sample("distance", distance, proxy.shape[0], proxy.device)
        distance = distance.to(torch.float64)
    checks.choice("norm", norm, native.NORMS)
    checks.choice("diversity_scale", diversity_scale, native.DIVERSITY_SCALES)
    chosen = backends.select("group_advantages", backend, proxy.device, proxy.dtype, BACKENDS)
    operands = (proxy.to(torch.float64), group_ids, distance, norm, diversity_scale)
    advantage: Tensor = _group_advantages(chosen, *operands)
    return advantage.to(checks.compute_dtype(proxy))
